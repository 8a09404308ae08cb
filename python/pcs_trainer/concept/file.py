"""The one file of a concept: safetensors, with how it was made in its header. No pickle is ever read."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..files import read_safetensors, write_safetensors
from .concept import PAIRS, Concept

FORMAT = "pcs_concept"
VERSION = "1"
PARTS = ("unet.", "text_encoder.", "text_encoder_2.", "context.")


def save_concept(concept: Concept, path: Path) -> Path:
    tensors = dict(concept.tensors)
    for word, rows in concept.words.items():
        tensors.update({f"word.{e}.{word}": r for e, r in enumerate(rows)})
    from .header import described

    own = {"format": FORMAT, "version": VERSION, "method": concept.method, "base": concept.base}
    return write_safetensors(path, tensors, described(concept) | concept.meta | own)


def read_concept(path: Path) -> Concept:
    tensors, header = read_safetensors(path)
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no concept file of this package; LoRA and embedding files go through import_concept"
        )
    words: dict[str, dict[int, Tensor]] = {}
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("word."):
            _, number, word = name.split(".", 2)
            words.setdefault(word, {})[int(number)] = tensor
        elif name.startswith(PARTS):
            kept[name] = tensor
        else:
            raise ValueError(f"{path}: the tensor {name!r} has no place in a concept")
    for name in kept:
        for ending, other in [*PAIRS.items(), *((b, a) for a, b in PAIRS.items())]:
            if name.endswith(ending) and name.removesuffix(ending) + other not in kept:
                raise ValueError(f"{path}: the tensor {name!r} has no partner ending in {other!r}")
    meta = {k: v for k, v in header.items() if not k.startswith(("modelspec.", "ss_"))}
    base, method = meta.pop("base", ""), meta.pop("method", "unknown")
    for own in ("format", "version"):
        meta.pop(own, None)
    rows = {word: [parts[e] for e in sorted(parts)] for word, parts in words.items()}
    return Concept(method, kept, rows, meta, base)
