"""The names that other tools' files give to the layers of the UNet and of the text encoders.

Four ways of writing `down_blocks.1.attentions.0.proj_out`:
    diffusers and PEFT   unet.down_blocks.1.attentions.0.proj_out
    kohya                lora_unet_down_blocks_1_attentions_0_proj_out
    kohya for SDXL       lora_unet_input_blocks_4_1_proj_out        (the names of Stability's own network)
    ComfyUI              diffusion_model.input_blocks.4.1.proj_out
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ...unet.config import family
from ..base_weights import parameters_of, parts_of
from ..grammar import TEXT_PARTS, UNET, Part

if TYPE_CHECKING:
    from ...model.model import Model

KOHYA_TEXT: dict[int, dict[Part, str]] = {  # number of text encoders -> what kohya's names begin with
    1: {"text_encoder": "lora_te"},
    2: {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}
COMFY_TEXT: dict[Part, str] = {"text_encoder": "lh", "text_encoder_2": "g"}  # L of SD1.x and SDXL, H of SD2.x, G
CLIP_NAMES = ("clip_l", "clip_g")  # keys of a word's token embeddings for SDXL's two encoders
STABILITY_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
STABILITY_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
BLOCK = re.compile(r"(down|up|mid)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def stability_name(module: str, settings: dict[str, Any]) -> str:
    """A layer of the UNet by the name it has in Stability's network (SDXL's files use these).

    There the levels are not nested: every block of the way down, then of the way up, has one running number.
    """
    if module in STABILITY_ENDS:
        return STABILITY_ENDS[module]
    found = BLOCK.fullmatch(module)
    if not found:
        return module
    side, level, kind, j, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        rest = STABILITY_RESNET.get(rest, rest)
    part = {"resnets": 0, "attentions": 1}.get(kind)
    counts = settings["layers_per_block"]
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * j}.{rest}"
    if side == "down":
        before = 1 + sum(n + 1 for n in counts[:level])  # conv_in, then the resnets and one downsampler of each level
        if kind == "downsamplers":
            return f"input_blocks.{before + counts[level]}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{before + j}.{part}.{rest}"
    before = sum(n + 1 for n in counts[::-1][:level])  # the way up has one resnet more a level
    if kind == "upsamplers":
        has_attention = settings["up_block_types"][level].startswith("CrossAttn")
        return f"output_blocks.{before + counts[::-1][level]}.{1 + has_attention}.{rest}"
    return f"output_blocks.{before + j}.{part}.{rest}"


def kohya_name(part: Part, module: str, model: Model | None, encoders: int) -> str:
    """kohya's name for a layer, `lora_unet_...` or `lora_te_...`.

    Args:
        model: the base model; of SDXL's the UNet's layers have Stability's names.
        encoders: how many text encoders that family has; with two they are numbered.
    """
    if part != UNET:
        return f"{KOHYA_TEXT[encoders][part]}_{module.replace('.', '_')}"
    if model is not None and family(model.unet.settings) == "sdxl":
        module = stability_name(module, model.unet.settings)
    return f"lora_unet_{module.replace('.', '_')}"


class LayerNames:
    """A model's layers by any of the names that files give them."""

    def __init__(self, model: Model) -> None:
        self._known: dict[str, tuple[Part, str]] = {}
        encoders = len(model.text_encoders)
        self._only_encoder = TEXT_PARTS[0] if encoders == 1 else "none"
        for part in parts_of(model):
            for parameter in parameters_of(model, part):
                module = parameter.rpartition(".")[0]
                for name in _names(part, module, model.unet.settings, encoders):
                    self._known[name] = (part, module)

    def find(self, name: str, part: Part | None = None) -> tuple[Part, str] | None:
        """(part, module) of a layer by a file's name for it.

        part: of a name without one; None takes it for the UNet's, and where that has none such for the only encoder's.
        """
        known = self._known
        if part is not None:
            return known.get(f"{part}.{name}") or known.get(name)
        return known.get(name) or known.get(f"{UNET}.{name}") or known.get(f"{self._only_encoder}.{name}")


def _names(part: Part, module: str, settings: dict[str, Any], encoders: int) -> list[str]:
    """What files call a module."""
    flat = module.replace(".", "_")
    if part == UNET:
        theirs = stability_name(module, settings)
        names = [f"lora_unet_{flat}", f"lora_unet_{theirs.replace('.', '_')}", f"lycoris_{flat}"]
        return [f"{part}.{module}", f"diffusion_model.{theirs}", *names]
    prefixes = [KOHYA_TEXT[encoders][part]]
    if part == TEXT_PARTS[0]:
        prefixes.append(KOHYA_TEXT[2][part])  # newer tools number a single encoder too
    if encoders == 1:
        prefixes.append("lycoris")
    names = [f"{prefix}_{flat}" for prefix in prefixes]
    comfy = [f"text_encoders.clip_{letter}.transformer.{module}" for letter in COMFY_TEXT[part]]
    return [f"{part}.{module}", f"{part}.{module.removeprefix('text_model.')}", *names, *comfy]
