"""diffusers' files: LoRA, Custom Diffusion's attention processors, and embeddings."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..base_weights import BaseWeights
from ..concept import Concept
from ..grammar import UNET, Half, Kind, Slot, spell, value_name, word_name
from .layer_names import CLIP_NAMES
from .pairs import plain_pairs, shaped_pairs
from .report import Report, file_header, file_part, write_file

if TYPE_CHECKING:
    from ...model.model import Model

LORA_FILE = "pytorch_lora_weights.safetensors"
CUSTOM_FILE = "pytorch_custom_diffusion_weights.safetensors"
CUSTOM_LAYERS = {
    "to_k.weight": "to_k_custom_diffusion.weight",
    "to_v.weight": "to_v_custom_diffusion.weight",
    "to_q.weight": "to_q_custom_diffusion.weight",
    "to_out.0.weight": "to_out_custom_diffusion.0.weight",
    "to_out.0.bias": "to_out_custom_diffusion.0.bias",
}
ALWAYS = ("to_k.weight", "to_v.weight")  # a processor of diffusers has both, or all five
PEFT_NAMES = {Half.DOWN: "lora_A", Half.UP: "lora_B"}
CROSS = re.compile(r"(.+\.attn2)\.(to_[kvq]\.weight|to_out\.0\.(?:weight|bias))")


def write_diffusers(concept: Concept, folder: Path, model: Model | None, metadata: bool, report: Report) -> None:
    """A LoRA file, a Custom Diffusion file and one file a word, as far as the concept has them.

    model: the base model, needed where whole values are to be made of differences. metadata: write how it was made.
    """
    base = BaseWeights(model) if model is not None else None
    fields = concept.described() if metadata else None
    pairs = shaped_pairs(concept, base)
    if pairs:
        tensors, names = _lora(pairs)
        ranks = {slot: len(down) for slot, (down, _) in pairs.items()}
        own = {"lora_adapter_metadata": json.dumps(adapter_metadata(ranks), sort_keys=True)}
        write_file(folder / LORA_FILE, tensors, file_header(tensors, fields) | own, names, report)
    if concept.wholes():
        tensors, names = _custom_diffusion(concept, base)
        write_file(folder / CUSTOM_FILE, tensors, file_header(tensors, fields), names, report)
        report.notes.append(f"load {CUSTOM_FILE} with pipe.unet.load_attn_procs(..., _pipeline=pipe)")
    for word, rows in concept.words.items():
        of_word = "" if word == concept.token else f"_{file_part(word)}"
        keys = [word] if len(rows) == 1 else list(CLIP_NAMES)
        tensors = dict(zip(keys, rows, strict=True))
        names = {word_name(e, word): key for e, key in enumerate(keys)}
        file = folder / f"learned_embeds{of_word}.safetensors"
        described = concept.described("textual-inversion") if metadata else None
        write_file(file, tensors, file_header(tensors, described), names, report)


def needs_pipeline(concept: Concept) -> bool:
    """Whether a concept holds changes that diffusers has no small file for."""
    found = [_cross(slot) for slot in concept.changes()]
    replaced = {match[1] for match in found if match}
    # A processor of Custom Diffusion computes its own projections, which a LoRA on them would not reach.
    own = tuple(f"{module}." for module in replaced)
    clash = any(slot.part == UNET and slot.layer.startswith(own) for slot in plain_pairs(concept))
    return not all(found) or clash


def adapter_metadata(ranks: Mapping[Slot, int]) -> dict[str, object]:
    """What diffusers builds PEFT's configuration from: each layer's rank and an equal alpha, so every scale is 1."""
    fields: dict[str, object] = {}
    by_part: dict[str, dict[str, int]] = defaultdict(dict)
    for slot, rank in ranks.items():
        by_part[slot.part][slot.layer.removeprefix("text_model.")] = rank
    for part, of in by_part.items():
        common = Counter(of.values()).most_common(1)[0][0]
        others = {module: rank for module, rank in of.items() if rank != common}
        values = {"r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others}
        fields |= {f"{part}.{name}": value for name, value in values.items()}
        fields[f"{part}.target_modules"] = sorted(of)
    return fields


def _lora(pairs: Mapping[Slot, tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, names = {}, {}
    for slot, pair in pairs.items():
        for half, tensor in zip(Half, pair, strict=True):
            key = f"{slot.path}.{PEFT_NAMES[half]}.weight"
            tensors[key] = tensor
            names[spell(slot, half)] = key
    return tensors, names


def _cross(slot: Slot) -> re.Match[str] | None:
    """(attention layer, parameter) of a change in the attention over the text; None for every other."""
    return CROSS.fullmatch(slot.layer) if slot.part == UNET else None


def _custom_diffusion(concept: Concept, base: BaseWeights | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The attention processors of diffusers' Custom Diffusion: one for each attention layer, empty where unchanged."""
    changed: dict[str, dict[str, Tensor]] = defaultdict(dict)
    names = {}
    for slot, value in concept.changes().items():
        match = _cross(slot)
        assert match is not None, f"{slot.path} needs a whole pipeline"  # needs_pipeline has sorted these out
        module, layer = match.groups()
        changed[module][layer] = _whole_value(concept, slot, value, base)
        names[spell(slot)] = f"{module}.processor.{CUSTOM_LAYERS[layer]}"
    tensors = {}
    for module, own in changed.items():
        complete = any("to_q" in layer or "to_out" in layer for layer in own)
        for layer in CUSTOM_LAYERS if complete else ALWAYS:
            if layer not in own and base is None:
                raise ValueError(
                    f"{module} lacks {layer}, which diffusers' file needs: give the base model (model=...)"
                )
            value = own[layer] if base is None or layer in own else base.value(value_name(UNET, f"{module}.{layer}"))
            tensors[f"{module}.processor.{CUSTOM_LAYERS[layer]}"] = value
    for module in sorted(_attention_layers(changed, base) - changed.keys()):
        tensors[f"{module}.processor"] = torch.zeros(0)  # diffusers' sign for an untrained layer
    return tensors, names


def _whole_value(concept: Concept, slot: Slot, value: Tensor, base: BaseWeights | None) -> Tensor:
    if slot.kind is Kind.VALUE:
        return value
    if base is None:
        raise ValueError(f"{spell(slot)} is a difference: give the base model (model=...) it is to be added to")
    tuned = base.tuned(concept, value_name(slot.part, slot.layer))
    assert tuned is not None  # the concept holds a difference there
    return tuned.to(value.dtype)


def _attention_layers(changed: Mapping[str, object], base: BaseWeights | None) -> set[str]:
    """All attention layers of the UNet; without the base model those beside the changed ones."""
    if base is None:
        return {module.removesuffix("2") + number for module in changed for number in "12"}
    queries = (n.removeprefix(f"{UNET}.").removesuffix(".to_q.weight") for n in base.parameters)
    return {n for n in queries if n.endswith((".attn1", ".attn2"))}
