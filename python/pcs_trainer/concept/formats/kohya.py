"""kohya's files: one LoRA file, and one file a word for A1111 and ComfyUI.

Readers keep one tensor for a layer's weight: of a pair and a difference they would drop one, so a pair joins the
difference. Of a text encoder they know the projections alone; what else is trained there is reported as left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..base_weights import BaseWeights
from ..concept import Concept
from ..grammar import UNET, Kind, Slot, names, parse, spell, word_name
from .layer_names import CLIP_NAMES, kohya_name
from .pairs import Pairs, plain_pairs, shaped_pairs
from .report import Report, file_header, file_part, write_file

if TYPE_CHECKING:
    from ...model.model import Model

# The layers of a text encoder that kohya's names are known for by ComfyUI, A1111, LyCORIS and kohya's own tools.
TEXT_LAYERS = re.compile(r"text_model\.encoder\.layers\.\d+\.(mlp\.fc[12]|self_attn\.([kqv]|out)_proj)\.")
NOT_READ = (
    "no program reads this layer of a text encoder from kohya's files, which know its projections alone; a whole "
    "pipeline holds it"
)


@dataclass
class _Embedding:
    """A word's file: its name is the word there."""

    word: str
    name: str
    tensors: dict[str, Tensor]
    names: dict[str, str]


def write_kohya(
    concept: Concept, folder: Path, model: Model | None, metadata: bool, bundle: bool, same_rank: bool, report: Report
) -> None:
    """One LoRA file, and the words in `embeddings/`.

    Args:
        model: the base model; needed where the concept holds whole values.
        metadata: write how it was made.
        bundle: put the words into the LoRA file too.
        same_rank: pad all pairs with zeros to the largest rank.
    """
    base = BaseWeights(model) if model is not None else None
    fields = concept.described() if metadata else None
    encoders = 2 if concept.meta.get("family") == "sdxl" else 1
    concept = _readable(concept, report)
    changed = {slot.path.removesuffix(".weight") for slot in concept.changes() if slot.path.endswith(".weight")}
    pairs = {slot: pair for slot, pair in shaped_pairs(concept, base).items() if slot.path not in changed}
    pairs = _padded(pairs) if same_rank else pairs
    tensors, own = _low_rank(pairs, model, encoders)
    differences, more = _differences(concept, base, model, encoders)
    tensors, own = tensors | differences, own | more
    if bundle:
        for word in _embeddings(concept):
            tensors |= {f"bundle_emb.{word.name}.{_bundled(key)}": t for key, t in word.tensors.items()}
    if tensors:
        file = folder / f"{file_part(concept.key)}.safetensors"
        write_file(file, tensors, file_header(tensors, fields), own, report)
    if differences:
        report.notes.append("whole weights are written as differences, which ComfyUI reads; compress makes them a LoRA")
    if len({len(down) for down, _ in pairs.values()}) > 1:
        report.notes.append(
            "its layers have several ranks: diffusers 0.32 loads such a file too weak (same_rank=True, or --same-rank, "
            "pads them to one)"
        )
    write_words(concept, folder, metadata, report)


def _readable(concept: Concept, report: Report) -> Concept:
    """The concept without the layers of text encoders that no reader of kohya's files knows."""
    slots = {name: parse(name) for name in concept.tensors}
    lost = {name for name, slot in slots.items() if slot.part != UNET and not TEXT_LAYERS.match(f"{slot.layer}.")}
    lost -= report.skipped.keys()
    report.skipped |= dict.fromkeys(sorted(lost), NOT_READ)
    return replace(concept, tensors={name: t for name, t in concept.tensors.items() if name not in lost})


def _padded(pairs: Pairs) -> Pairs:
    """Pairs of one rank, the largest: rows and columns of zeros added, the products as they were."""
    rank = max((len(down) for down, _ in pairs.values()), default=0)
    padded = {}
    for slot, (down, up) in pairs.items():
        more = rank - len(down)
        rows, columns = down.new_zeros(more, *down.shape[1:]), up.new_zeros(len(up), more, *up.shape[2:])
        padded[slot] = (torch.cat([down, rows]), torch.cat([up, columns], dim=1))
    return padded


def write_words(concept: Concept, folder: Path, metadata: bool, report: Report) -> None:
    """Write each word's file in `embeddings/`, as A1111 and ComfyUI read it. metadata: write how it was made."""
    fields = concept.described("textual-inversion") if metadata else None
    for word in _embeddings(concept):
        file = folder / "embeddings" / f"{word.name}.safetensors"
        write_file(file, word.tensors, file_header(word.tensors, fields), word.names, report)
        if word.word != word.name:
            called = f"{word.name} in A1111, embedding:{word.name} in ComfyUI"
            report.notes.append(f"the word {word.word} is called {word.name} there: {called}")


def _low_rank(pairs: Pairs, model: Model | None, encoders: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    own: dict[str, str] = {}
    alphas = _alphas(pairs)
    for slot, (down, up) in pairs.items():
        flat, rank = kohya_name(slot.part, slot.layer, model, encoders), len(down)
        keys = (f"{flat}.lora_down.weight", f"{flat}.lora_up.weight")
        up = up if alphas[slot] == rank else up * (rank / alphas[slot])
        tensors |= dict(zip(keys, (down, up), strict=True))
        tensors[f"{flat}.alpha"] = torch.tensor(float(alphas[slot]))
        own |= dict(zip(names(slot), keys, strict=True))
    return tensors, own


def _alphas(pairs: Mapping[Slot, tuple[Tensor, Tensor]]) -> dict[Slot, int]:
    """Each pair's alpha: its rank, so that readers scale it by 1.

    diffusers loses the alphas of attention and text layers where they differ, so such files get one alpha for all, and
    the writer scales `up` instead.
    """
    ranks = {slot: len(down) for slot, (down, _) in pairs.items()}
    loses = any(".attn" in slot.layer or slot.part != UNET for slot in ranks)
    if len(set(ranks.values())) > 1 and loses:
        return dict.fromkeys(ranks, Counter(ranks.values()).most_common(1)[0][0])
    return ranks


def _differences(
    concept: Concept, base: BaseWeights | None, model: Model | None, encoders: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Whole values as differences from the base model; a low-rank pair on the same weight is part of its difference."""
    tensors: dict[str, Tensor] = {}
    own: dict[str, str] = {}
    pairs = plain_pairs(concept)
    for slot, value in concept.changes().items():
        change = value.double()
        if slot.kind is Kind.VALUE:
            if base is None:
                raise ValueError(
                    f"{spell(slot)} is a whole value: give the base model (model=...) whose difference kohya's file "
                    "holds"
                )
            change = change - base.value(slot.path).double().to(value.device)
        module, _, kind = slot.layer.rpartition(".")
        key = f"{kohya_name(slot.part, module, model, encoders)}.{'diff' if kind == 'weight' else 'diff_b'}"
        pair = Slot(slot.part, module, Kind.PAIR)
        if kind == "weight" and pair in pairs and key not in tensors:
            down, up = (half.double() for half in pairs[pair])
            change = change + (up @ down).reshape(change.shape)
            own |= dict.fromkeys(names(pair), key)
        tensors[key] = (tensors[key].double() + change if key in tensors else change).to(value.dtype)
        own[spell(slot)] = key
    return tensors, own


def _embeddings(concept: Concept) -> list[_Embedding]:
    """A file for each word; its name must not be an ordinary word, which prompts may hold too."""
    found = []
    for word, rows in concept.words.items():
        plain = file_part(word)
        keys = ["emb_params"] if len(rows) == 1 else list(CLIP_NAMES)
        own = {word_name(e, word): key for e, key in enumerate(keys)}
        name = plain if plain == word else f"v-{plain}"
        found.append(_Embedding(word, name, dict(zip(keys, rows, strict=True)), own))
    return found


def _bundled(key: str) -> str:
    """An embedding file's key in a bundle."""
    return "string_to_param.*" if key == "emb_params" else key
