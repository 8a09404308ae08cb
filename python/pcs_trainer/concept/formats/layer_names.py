"""The names that other tools' files give to the layers of the UNet and of the text encoders.

Three ways of writing `down_blocks.1.attentions.0.proj_out`:
    diffusers and PEFT   unet.down_blocks.1.attentions.0.proj_out
    kohya                lora_unet_down_blocks_1_attentions_0_proj_out
    kohya for SDXL       lora_unet_input_blocks_4_1_proj_out        (the names of Stability's own network)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...model.text_adapters import file_name
from ...unet.config import family

if TYPE_CHECKING:
    from ...model.model import Model
    from ..concept import Concept

PARTS = ("unet", "text_encoder", "text_encoder_2")
KOHYA_TEXT = {1: {"text_encoder": "lora_te"}, 2: {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}}
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
EMBEDDINGS = ("token_embedding", "position_embedding", "class_embedding")
BLOCK = re.compile(r"(down|up|mid)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def stability_name(module: str, settings: dict[str, Any]) -> str:
    """A layer of the UNet by the name it has in Stability's network (SDXL's files use these)."""
    if module in STABILITY_ENDS:
        return STABILITY_ENDS[module]
    found = BLOCK.fullmatch(module)
    if not found:
        return module
    side, i, kind, j, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        rest = STABILITY_RESNET.get(rest, rest)
    part = {"resnets": 0, "attentions": 1}.get(kind)
    counts = settings["layers_per_block"]
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * j}.{rest}"
    if side == "down":
        before = 1 + sum(n + 1 for n in counts[:i])
        if kind == "downsamplers":
            return f"input_blocks.{before + counts[i]}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{before + j}.{part}.{rest}"
    before = sum(n + 1 for n in counts[::-1][:i])
    if kind == "upsamplers":
        has_attention = settings["up_block_types"][i].startswith("CrossAttn")
        return f"output_blocks.{before + counts[::-1][i]}.{1 + has_attention}.{rest}"
    return f"output_blocks.{before + j}.{part}.{rest}"


def kohya_name(part: str, module: str, model: Model | None, encoders: int) -> str:
    """`lora_unet_...` or `lora_te_...` for a layer; SDXL's names where the model says that it is one."""
    if part != "unet":
        return f"{KOHYA_TEXT[encoders][part]}_{module.replace('.', '_')}"
    if model is not None and family(model.unet.settings) == "sdxl":
        module = stability_name(module, model.unet.settings)
    return f"lora_unet_{module.replace('.', '_')}"


class Layers:
    """A model's parameters by the names that a concept uses, and its layers by any of the names above."""

    def __init__(self, model: Model) -> None:
        self.parameters: dict[str, Tensor] = {}  # part.parameter
        self.by_name: dict[str, tuple[str, str]] = {}
        settings = model.unet.settings
        for name, p in model.unet.named_parameters():
            self._add("unet", name, p)
            module = name.rpartition(".")[0]
            for known in (module, stability_name(module, settings)):
                self.by_name[f"lora_unet_{known.replace('.', '_')}"] = ("unet", module)
        for part, encoder in zip(PARTS[1:], model.text_encoders, strict=False):
            prefixes = [KOHYA_TEXT[len(model.text_encoders)][part]]
            prefixes += ["lora_te1"] * (part == "text_encoder")
            for name, p in encoder.named_parameters():
                name = file_name(name)
                self._add(part, name, p)
                module = name.rpartition(".")[0]
                self.by_name[f"{part}.{module.removeprefix('text_model.')}"] = (part, module)
                for prefix in prefixes:
                    self.by_name[f"{prefix}_{module.replace('.', '_')}"] = (part, module)

    def _add(self, part: str, parameter: str, value: Tensor) -> None:
        self.parameters[f"{part}.{parameter}"] = value.detach()
        module = parameter.rpartition(".")[0]
        self.by_name[f"{part}.{module}"] = (part, module)

    def find(self, name: str) -> tuple[str, str] | None:
        """(part, module) of a layer by a file's name for it; a dotted name without a part is the UNet's."""
        return self.by_name.get(name) or self.by_name.get(f"unet.{name}")

    def takes_residual(self, module: str) -> bool:
        """Whether a low-rank pair can sit on `part.module`: a linear layer, or a transformer's 1x1 convolution."""
        weight = self.parameters.get(f"{module}.weight")
        name = module.rpartition(".")[2]
        if weight is None or name in EMBEDDINGS:
            return False
        return weight.dim() == 2 or (weight.dim() == 4 and name in ("proj_in", "proj_out"))

    def tuned(self, concept: Concept, parameter: str) -> Tensor | None:
        """The value of `part.parameter` with the concept on it, in float64; None where the concept leaves it alone."""
        base, own = self.parameters[parameter], concept.tensors
        module = parameter.removesuffix(".weight")
        if not {parameter, f"{parameter}.diff", f"{module}.down"} & own.keys():
            return None
        value = own.get(parameter, base).double()
        if f"{parameter}.diff" in own:
            value = value + own[f"{parameter}.diff"].double().to(value.device)
        if f"{module}.down" in own:
            down, up = own[f"{module}.down"].double(), own[f"{module}.up"].double()
            value = value + (up @ down).reshape(value.shape).to(value.device)
        return value
