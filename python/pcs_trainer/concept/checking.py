"""What a file must hold to be a concept, whatever model it is for: kinds, shapes and a record that can be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .grammar import LOW_RANK, TEXT_PARTS, Half, Part, half_of, names, parse
from .header import FAMILIES

KEPT = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # the kinds of numbers that concepts compute with

# Bytes: a word is part of the names of its files, which systems end at 255, with the names of other words beside it.
LONGEST_WORD = 100


def check_word(word: str) -> None:
    """Raise ValueError where a text cannot be a subject's new word."""
    advice = "choose one such as '<mug>'"
    if not word.strip():
        raise ValueError(f"the new word is blank; {advice}")
    wrong = next((c for c in word if c in ",={}" or c.isspace() or not c.isprintable()), None)
    if wrong is not None:
        what = {",": "a comma", "=": "an equals sign", " ": "a space", "{": "a brace", "}": "a brace"}.get(
            wrong, repr(wrong)
        )
        raise ValueError(f"{word[:LONGEST_WORD]!r} holds {what}, and a subject has one word; {advice}")
    size = len(word.encode())
    if size > LONGEST_WORD:
        raise ValueError(
            f"the word {word[:20] + '...'!r} has {size:,} bytes, too many for the names of its files, of which a word "
            f"can have {LONGEST_WORD}; {advice}"
        )


def as_numbers(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor in a kind of floating-point numbers that can be computed with; float8 becomes float32."""
    if tensor.is_complex() or not tensor.is_floating_point():
        raise ValueError(f"{path}: the tensor {name!r} is of {tensor.dtype}; expected floating-point numbers")
    return tensor if tensor.dtype in KEPT else tensor.float()


def check_pairs(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where two halves do not make a product, or a tensor is empty."""
    for name, tensor in tensors.items():
        slot = parse(name)
        if slot.kind not in LOW_RANK:
            if not tensor.numel():
                raise ValueError(f"{path}: the tensor {name!r} of shape {list(tensor.shape)} is empty")
            continue
        if half_of(name) is not Half.DOWN:
            continue
        down_name, up_name = names(slot)
        down, up = tensors[down_name], tensors[up_name]
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or not down.numel() or not up.numel():
            raise ValueError(
                f"{path}: {down_name!r} {list(down.shape)} and {up_name!r} {list(up.shape)} make no low-rank residual; "
                "expected [rank, inputs] and [outputs, rank]"
            )


def check_words(path: Path, words: Mapping[str, Mapping[Part, Tensor]]) -> None:
    """Raise ValueError where a word lacks a text encoder's rows, or has rows that are not token embeddings."""
    for word, parts in words.items():
        expected = TEXT_PARTS[: len(parts)]
        if set(parts) != set(expected):
            raise ValueError(f"{path}: the word {word!r} has no token embeddings for the first text encoder")
        shapes = [list(parts[part].shape) for part in expected]
        if any(len(shape) != 2 or not all(shape) for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
            raise ValueError(f"{path}: the token embeddings of {word!r} have shapes {shapes}; expected [rows, width]")


def check_record(path: Path, fields: Mapping[str, str], version: str) -> None:
    """Raise ValueError where the header is of a later version, or what it says of the subjects cannot be read."""
    found = fields.get("version", version)
    if found != version:
        raise ValueError(
            f"{path} is of version {found[:20]!r}; this package reads {version}. Fix: install a newer pcs_kernels"
        )
    try:
        subjects = json.loads(fields.get("subjects") or "[]")
        good = isinstance(subjects, list) and all(_is_subject(subject) for subject in subjects)
    except (ValueError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{path}: the header's subjects cannot be read; expected a list of [token, class word]")
    try:
        named = json.loads(fields.get("names") or "[]")
        settings = json.loads(fields.get("settings") or "{}")
        good = isinstance(named, list) and all(isinstance(name, str) for name in named)
        good = (
            good
            and fields.get("family", "sd1") in FAMILIES
            and isinstance(settings, dict)
            and 0 <= float(settings.get("noise_level") or 0) < 1
        )
    except (ValueError, TypeError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{path}: the header's names, settings or family cannot be read; export it again")


def _is_subject(subject: object) -> bool:
    return isinstance(subject, list) and len(subject) == 2 and all(isinstance(word, str) for word in subject)
