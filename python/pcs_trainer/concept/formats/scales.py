"""alpha / rank of a file's layers: diffusers' header, PEFT's adapter_config.json, and 1 where neither is there.

A key of PEFT's patterns may be a regular expression. Files come from anywhere, and Python's search can take exponential
time, so expressions are few, short and of simple parts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..grammar import PARTS, Part

Scale = Callable[[Part, str, int], float]  # (part, module, rank) -> what the product of a layer's factors is scaled by
PEFT_CONFIG, PEFT_STEM = "adapter_config.json", "adapter_model"
ADAPTERS = ("LORA", "LOHA", "LOKR")  # the kinds of PEFT whose files can be read
PLAIN = re.compile(r"[\w.-]+")
# What an expression may be made of: names, escaped dots, digits, sets of characters, anchors, ".*" and one "(a|b)".
EXPRESSION = re.compile(r"(?:[\w-]|\\\.|\\d\+?|\[\^?[\w.-]+\][+*]?|\.[*+]?|[\^$|]|\((?:\?:)?[\w.|-]+\)(?![*+?{]))+")
# Each repetition multiplies a search by a name's length, a group by its members: with two of them the slowest of 16
# expressions takes two seconds for SDXL's 700 layers, with three a minute.
MOST_EXPRESSIONS, MOST_CHARACTERS, MOST_OPEN = 16, 200, 2


@dataclass(frozen=True)
class Pattern:
    """What PEFT calls a key of a pattern: a module's name or its end, or an expression for it."""

    key: str
    expression: re.Pattern[str] | None

    def matches(self, module: str) -> bool:
        """Whether PEFT's rule gives this key to a module."""
        if self.expression is None:
            return module == self.key or module.endswith(f".{self.key}")
        return self.expression.match(module) is not None


@dataclass
class Alphas:
    """PEFT's alpha of each module."""

    common: float | None = None
    rank: int | None = None  # of every module, as far as the file's own tensors do not tell
    patterns: list[tuple[Pattern, float]] = field(default_factory=list)
    rank_stabilized: bool = False

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank); 1 without an alpha."""
        alpha = next((value for pattern, value in self.patterns if pattern.matches(module)), self.common)
        rank = rank or self.rank or 1
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def file_scale(file: Path, header: Mapping[str, str]) -> Scale:
    """The scale of each layer of a file whose layers have no alpha of their own; rank 0: the factors do not tell it.

    Raises ValueError, one sentence, where the header or the configuration beside the file cannot be read.
    """
    config = file.parent / PEFT_CONFIG
    if file.stem == PEFT_STEM and config.is_file():
        own = _peft_alphas(config)
        return lambda _part, module, rank: own.scale(module, rank)
    said = f"{file}: the header's lora_adapter_metadata"
    fields = _json(header.get("lora_adapter_metadata", "{}"), said)
    alphas = {part: _alphas({k.removeprefix(f"{part}."): v for k, v in fields.items()}, said) for part in PARTS}
    return lambda part, module, rank: alphas[part].scale(module, rank)


def _peft_alphas(config: Path) -> Alphas:
    try:
        fields = _json(config.read_text(encoding="utf-8"), str(config))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} cannot be read ({error})") from None
    kind = fields.get("peft_type", "LORA")
    if kind not in ADAPTERS:
        raise ValueError(f"{config} is of an adapter of the kind {kind!r}; those that can be imported: {ADAPTERS}")
    if kind != "LORA" and "alpha" in fields:
        fields = fields | {"lora_alpha": fields["alpha"]}
    return _alphas(fields, str(config))


def _json(text: str, said: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("expected a JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{said} cannot be read ({error})") from None
    return fields


def _alphas(fields: Mapping[str, Any], said: str) -> Alphas:
    alpha, rank = fields.get("lora_alpha"), fields.get("r")
    patterns = fields.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{said}: alpha_pattern is {str(patterns)[:40]!r}; expected an object of names and numbers")
    found = [
        (_pattern(key, said), _number(value, f"{said}: alpha_pattern[{key!r}]")) for key, value in patterns.items()
    ]
    if sum(pattern.expression is not None for pattern, _ in found) > MOST_EXPRESSIONS:
        raise ValueError(f"{said}: alpha_pattern holds more than {MOST_EXPRESSIONS} regular expressions")
    return Alphas(
        None if alpha is None else _number(alpha, f"{said}: lora_alpha"),
        None if rank is None else max(1, int(_number(rank, f"{said}: r"))),
        found,
        bool(fields.get("use_rslora")),
    )


def _number(value: Any, said: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise ValueError(f"{said} is {str(value)[:40]!r}; expected a number")
    return float(value)


def _pattern(key: str, said: str) -> Pattern:
    """A key of a pattern, by PEFT's rule: (.*\\.)?(key)$ from the name's start."""
    if PLAIN.fullmatch(key):
        return Pattern(key, None)
    bounded = len(key) <= MOST_CHARACTERS and sum(map(key.count, "*+(")) <= MOST_OPEN
    if not bounded or not EXPRESSION.fullmatch(key):
        raise ValueError(
            f"{said}: alpha_pattern[{key[:40]!r}] is more than names and at most {MOST_OPEN} of '.*' and '(a|b)'; a "
            "search for it might not end, so it is not read: name the modules instead"
        )
    try:
        return Pattern(key, re.compile(rf"(.*\.)?({key})$"))
    except re.error as error:
        raise ValueError(f"{said}: alpha_pattern[{key[:40]!r}]: expected a regular expression ({error})") from None
