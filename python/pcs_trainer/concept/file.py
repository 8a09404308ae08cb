"""The one file of a concept: safetensors, with how it was made in its header. No pickle is ever read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..files import written
from .concept import PAIRS, Concept

FORMAT = "pcs_concept"
VERSION = "1"
PARTS = ("unet.", "text_encoder.", "text_encoder_2.", "context.")


def write_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """A safetensors file that is there whole or not at all; a full disk or a closed folder is one sentence."""
    from safetensors.torch import save_file

    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        return written(path, lambda part: save_file(plain, part, metadata))
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OSError(f"{path} could not be written ({reason}); free some space or choose another folder") from error


def save_concept(concept: Concept, path: Path) -> Path:
    tensors = dict(concept.tensors)
    for word, rows in concept.words.items():
        tensors.update({f"word.{e}.{word}": r for e, r in enumerate(rows)})
    from .header import described

    own = {"format": FORMAT, "version": VERSION, "method": concept.method, "base": concept.base}
    return write_whole(path, tensors, described(concept) | concept.meta | own)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file, or one sentence about what is wrong with it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; give the path of a file")
    with path.open("rb") as file:
        start = file.read(16)
    if start[8:9] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise ValueError(f"{path} is a pickle, which can run code when it is read; convert it to safetensors first")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({' '.join(str(error).split())})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: the tensor {name!r} holds NaN or infinity; the file is no use")
    return tensors, header


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
