"""Other tools' files as concepts: LoRA of diffusers, PEFT and kohya, Custom Diffusion, textual inversions.

A file's scale (alpha / rank) goes into `up`; low-rank changes of larger convolutions become differences. What a file
holds beyond that is named and refused. A pickle is read by torch's restricted loader alone, which runs no code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...files import check_finite, read_safetensors
from ...model.fingerprint import fingerprint
from ...unet.config import family
from ..attach import check_fits, text_widths
from ..base_weights import BaseWeights
from ..concept import FORMAT, Concept
from ..grammar import PARTS
from ..loading import check_differs, load_concept
from .converting import converted
from .layer_names import LayerNames
from .recognizing import Found, recognized
from .report import file_part, listed
from .scales import PEFT_CONFIG, file_scale

if TYPE_CHECKING:
    from ...model.model import Model

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TAKEN_OVER = {"ss_steps": "steps", "ss_seed": "seed", "ss_learning_rate": "learning_rate"}
QUOTED = 120  # characters of another library's error message: enough for its first sentence, and still one line


def import_concept(path: str | Path, model: Model, token: str | None = None, force: bool = False) -> Concept:
    """A concept from a file, or a folder of files, that another tool wrote for this model.

    Args:
        path: a .safetensors, .bin, .pt, .pth or .ckpt file, or a folder of them.
        model: the base model; names and shapes are checked against it.
        token: the word to call the subject by; default: the file's own.
        force: leave out what the files hold beyond this package's knowledge, and take a concept that changes nothing.
    """
    path = Path(path).expanduser()
    layers, base = LayerNames(model), BaseWeights(model)
    tensors: dict[str, Tensor] = {}
    words: dict[str, list[Tensor]] = {}
    unknown: list[str] = []
    headers: dict[str, str] = {}
    files = files_of(path)
    for file in files:
        raw, header = read_file(file)
        if header.get("format") == FORMAT:
            if len(files) > 1:
                raise ValueError(f"{file} is a whole concept, with other files beside it in its folder: name the file")
            own = load_concept(file, model, force)
            return own if token is None else own.renamed(token)
        found = recognized(raw, file, layers)
        tensors |= converted(found, file, base, file_scale(file, header))
        _add_words(found, words)
        unknown += found.unknown
        headers |= header
    _check_words(words, path, model)
    if unknown and not force:
        raise ValueError(
            f"{path} holds tensors for no layer of this model ({listed(unknown)}); "
            "if it was made for this model, force=True leaves them out"
        )
    if not tensors and not words:
        raise ValueError(f"{path} holds nothing that this package knows: no LoRA, Custom Diffusion or embedding")
    concept = _named(tensors, words, headers, model, path.stem, token)
    if unknown:
        concept.meta["left_out"] = ", ".join(unknown)
    check_fits(concept, model, str(path))
    check_differs(concept, model, str(path), force)
    return concept


def files_of(path: Path) -> list[Path]:
    """What import_concept reads: the file, or a folder's files; of one in both forms the safetensors.

    Raises ValueError for a folder without such a file, and for one that is a whole model.
    """
    if not path.is_dir():
        return [path]
    if (path / "model_index.json").is_file():
        raise ValueError(f"{path} is a whole model: use it as the base model itself (load_model)")
    # PEFT's trainers save each network into a folder of its own.
    folders = [path, *(path / part for part in PARTS if (path / part / PEFT_CONFIG).is_file())]
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    files += sorted(path.glob("embeddings/*.safetensors"))
    places = {file.with_suffix("") for file in files}
    files += [
        f
        for folder in folders
        for f in sorted(folder.iterdir())
        if f.suffix in PICKLES and f.with_suffix("") not in places
    ]
    if not files:
        raise ValueError(f"{path} has no safetensors and no .bin or .pt file")
    return files


def read_file(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A file's tensors (and, of a pickle, its few strings) by their full names, and its header."""
    if file.suffix not in PICKLES or not file.is_file():
        return read_safetensors(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        reason = " ".join(str(error).split())[:QUOTED]
        raise ValueError(
            f"{file} is a pickle of more than tensors ({reason}); reading it could run code, so it is refused: "
            "convert it to safetensors"
        ) from None
    flat: dict[str, Any] = {}
    _flatten(content if isinstance(content, Mapping) else {"": content}, "", flat)
    for name, value in flat.items():
        if isinstance(value, Tensor):
            check_finite(file, name, value)
    return flat, {}


def _flatten(content: Mapping[Any, Any], prefix: str, into: dict[str, Any]) -> None:
    for key, value in content.items():
        if isinstance(value, Mapping):
            _flatten(value, f"{prefix}{key}.", into)
        else:
            into[f"{prefix}{key}"] = value.detach() if isinstance(value, Tensor) else value


def _add_words(found: Found, words: dict[str, list[Tensor]]) -> None:
    """Join a file's words to those of the files before: of SDXL each encoder's embeddings may have a file."""
    for word, rows in found.words.items():
        words.setdefault(word, []).extend(
            r.float()[None] if r.dim() == 1 else r.float() for _, r in sorted(rows.items())
        )


def _check_words(words: dict[str, list[Tensor]], path: Path, model: Model) -> None:
    widths = text_widths(model)
    for word, rows in words.items():
        shapes = [list(r.shape) for r in rows]
        if any(len(s) != 2 or not s[0] for s in shapes) or [s[-1] for s in shapes] != widths:
            raise ValueError(
                f"{path}: the token embeddings of {word!r} have shapes {shapes}; this model's text width is {widths}"
            )


def _named(
    tensors: dict[str, Tensor],
    words: dict[str, list[Tensor]],
    header: dict[str, str],
    model: Model,
    title: str,
    token: str | None,
) -> Concept:
    kv = all(".attn2." in name and name.endswith((".weight", ".bias")) for name in tensors)
    method = "textual_inversion" if not tensors else "custom_diffusion" if kv else "lora"
    meta = {"title": header.get("modelspec.title", title), "base_name": model.name}
    meta |= {"family": family(model.unet.settings), "prediction": model.schedule.prediction}
    meta |= {ours: header[theirs] for theirs, ours in TAKEN_OVER.items() if theirs in header}
    subject, _, class_word = header.get("modelspec.trigger_phrase", "").partition(" ")
    words = {subject if word == f"v-{file_part(subject)}" else word: rows for word, rows in words.items()}
    if len(words) == 1:
        subject = next(iter(words)) if subject not in words else subject
    if token and subject not in words:
        subject = token  # no word was learned that could get another name: this is what the subject is called by
    if subject:
        meta |= {"token": subject} | ({"class_word": class_word} if class_word else {})
    concept = Concept(method, tensors, words, meta, fingerprint(model))
    return concept if token is None or token == concept.token else concept.renamed(token)
