"""What the tensors of another tool's file are, by their names: halves of a layer's pair, whole values, words."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..grammar import TEXT_PARTS, UNET, Part, value_name
from .layer_names import LayerNames

ENDINGS = (  # of a layer's tensors in the tools' files, and what the tensor is
    (re.compile(r"\.lora_A(?:\.\w+)?\.weight$"), "down"),
    (re.compile(r"\.lora_B(?:\.\w+)?\.weight$"), "up"),
    (re.compile(r"(?:[._]lora|\.lora_linear_layer)\.down\.weight$"), "down"),
    (re.compile(r"(?:[._]lora|\.lora_linear_layer)\.up\.weight$"), "up"),
    (re.compile(r"\.lora_down\.weight$"), "down"),
    (re.compile(r"\.lora_up\.weight$"), "up"),
    (re.compile(r"\.lora_mid\.weight$"), "mid"),
    (re.compile(r"(?:_lora)?\.alpha$"), "alpha"),
    (re.compile(r"\.diff$"), "diff"),
    (re.compile(r"\.diff_b$"), "diff_b"),
    (re.compile(r"\.w_norm$"), "diff"),  # LyCORIS's trained norms are differences too
    (re.compile(r"\.b_norm$"), "diff_b"),
    (re.compile(r"\.dora_scale$"), "dora_scale"),
    (re.compile(r"\.lora_magnitude_vector(?:\.\w+)*$"), "magnitude"),
    (re.compile(r"\.(?=hada_[wt]\d(?:_[ab])?$)"), "factor"),
    (re.compile(r"\.(?=lokr_[wt]\d(?:_[ab])?$)"), "factor"),
)
FACTORS = {  # of a layer's low-rank product: LoRA's, LoHa's and LoKr's
    "lora": {"down", "up", "mid"},
    "hada": {f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "lokr": {f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
REFUSED = {  # kinds of adapters that are not imported -> what their tensors' names end with
    "OFT or BOFT": re.compile(r"\.(oft_blocks|oft_r(\.\w+)?(\.weight)?|oft_diag|rescale)$"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "(IA)^3": re.compile(r"\.(on_input|ia3_l)$"),
    "AdaLoRA": re.compile(r"\.lora_E(\.\w+)?$"),
    "VeRA": re.compile(r"vera_(lambda_[bd]|[AB])"),
    "cloneofsimo's LoRA, whose layers are numbered and not named,": re.compile(r"^\w+:\d+:(up|down|rank|alpha)$"),
}
CUSTOM = re.compile(r"(.+\.attn[12])\.processor\.(to_[kvq]|to_out)_custom_diffusion\.(0\.)?(weight|bias)")
# The files of Custom Diffusion's own code: whole values, or after its compress.py the factors of a difference.
DELTA = re.compile(r"(?:unet|state_dict\.model)\.(.+\.attn2\.to_(?:[kvq]|out\.0))\.(weight|bias)(?:\.([uv]))?")
DELTA_WORD = re.compile(r"modifier_token\.(.+)")
DELTA_FACTORS = {"u": "up", "v": "down"}
PEFT_PREFIX = re.compile(r"^(?:(unet|text_encoder|text_encoder_2)\.)?base_model\.model\.")
OLD_TEXT_NAMES = {"self_attn.to_q": "self_attn.q_proj", "self_attn.to_k": "self_attn.k_proj"}
OLD_TEXT_NAMES |= {"self_attn.to_v": "self_attn.v_proj", "self_attn.to_out": "self_attn.out_proj"}
BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\.\*|emb_params|clip_l|clip_g)")
ROW_NAMES = {"string_to_param.*": 0, "emb_params": 0, "emp_params": 0, "clip_l": 0, "clip_g": 1}


@dataclass
class Found:
    """What was recognized in one file: tensors of layers by kind, parameters, words, and names of everything else."""

    layers: dict[tuple[Part, str], dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    tensors: dict[str, Tensor] = field(default_factory=dict)
    words: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    unknown: list[str] = field(default_factory=list)


def recognized(raw: dict[str, Any], file: Path, layers: LayerNames) -> Found:
    """The contents of a file by what they are.

    Raises ValueError, one sentence, for a kind of adapter that is known and cannot be imported.
    """
    found = Found()
    tensors = {name: t for name, t in raw.items() if isinstance(t, Tensor)}
    _refuse_kinds(tensors, file)
    if "string_to_param.*" in tensors:  # A1111's and the first textual inversions: one word, beside training's records
        name = raw.get("name") or next(iter(k.split(".", 1)[1] for k in raw if k.startswith("string_to_token.")), "")
        found.words[file.stem if name in ("", "*") else str(name)][0] = tensors["string_to_param.*"]
        return found
    if tensors.keys() & ROW_NAMES.keys():
        for name, tensor in tensors.items():
            if name in ROW_NAMES:
                found.words[file.stem][ROW_NAMES[name]] = tensor
            else:
                found.unknown.append(name)
        return found
    part = next((part for part in TEXT_PARTS if file.parent.name == part), None)  # a folder of PEFT's for each network
    for name, tensor in tensors.items():
        _place(name, tensor, found, layers, part)
    if not found.layers and not found.tensors and not found.words and not layers_alike(found.unknown):
        for name in found.unknown:  # diffusers' textual inversions: the word is the key
            found.words[name or file.stem][0] = tensors[name]
        found.unknown = []
    return found


def _refuse_kinds(tensors: dict[str, Tensor], file: Path) -> None:
    for kind, ending in REFUSED.items():
        name = next((name for name in tensors if ending.search(name)), None)
        if name is not None:
            raise ValueError(
                f"{file} holds {kind} ({name}), a kind of adapter that is not imported: merge it into its model with "
                "the tool that wrote it, and use that model"
            )


def layers_alike(names: list[str]) -> bool:
    """Whether names look like a network's: dotted, or ending as weights do."""
    return any(re.search(r"\.(weight|bias|alpha|diff|hada_\w+|lokr_\w+)$|^lora_|_embedding", name) for name in names)


def _place(name: str, tensor: Tensor, found: Found, layers: LayerNames, part: Part | None) -> None:
    bundled, custom, delta = BUNDLED.fullmatch(name), CUSTOM.fullmatch(name), DELTA.fullmatch(name)
    if bundled:
        found.words[bundled[1]][ROW_NAMES[bundled[2]]] = tensor
    elif word := DELTA_WORD.fullmatch(name):
        found.words[word[1]][0] = tensor
    elif name == "state_dict.embed" and tensor.dim() == 2:  # of several subjects the words are numbered from 1
        for i, row in enumerate(tensor, 1):
            found.words[f"<new{i}>"][0] = row
    elif custom:
        stem = custom[1].removeprefix(f"{UNET}.") + f".{custom[2]}{'.0' * (custom[2] == 'to_out')}"
        _place_value(name, layers.find(stem), custom[4], tensor, found)
    elif delta:
        where = layers.find(delta[1])
        if where is not None and delta[3]:
            found.layers[where][DELTA_FACTORS[delta[3]]] = tensor
        else:
            _place_value(name, where, delta[2], tensor, found)
    elif tensor.numel() == 0 and name.endswith((".attn1.processor", ".attn2.processor")):
        return  # Custom Diffusion's sign for a layer it left alone
    else:
        _place_in_layer(name, tensor, found, layers, part)


def _place_value(name: str, where: tuple[Part, str] | None, parameter: str, tensor: Tensor, found: Found) -> None:
    if where is None:
        found.unknown.append(name)
    else:
        found.tensors[value_name(where[0], f"{where[1]}.{parameter}")] = tensor


def _place_in_layer(name: str, tensor: Tensor, found: Found, layers: LayerNames, part: Part | None) -> None:
    for ending, kind in ENDINGS:
        match = ending.search(name)
        if match and kind == "factor":
            kind = name[match.end() :]
            if kind not in FACTORS["hada"] | FACTORS["lokr"]:
                continue
        where = layers.find(module_name(name[: match.start()]), part) if match else None
        if where is not None:
            found.layers[where][kind] = tensor
            return
    found.unknown.append(name)


def module_name(stem: str) -> str:
    """A layer's name without what older and newer writers put around it."""
    stem = PEFT_PREFIX.sub(lambda match: f"{match[1]}." if match[1] else "", stem)
    stem = stem.replace(".processor.", ".").removesuffix(".processor")
    for old, new in OLD_TEXT_NAMES.items():
        stem = stem.replace(old, new)
    return f"{stem}.0" if stem.endswith(".to_out") else stem
