"""A base model's parameters by the names that a concept uses, and their values with a concept on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..model.text_adapters import file_name
from ..unet.int8 import layer_in_8_bits, original, own_parameters
from .grammar import PARTS, TEXT_PARTS, UNET, Part, difference_name, pair_names, parse, value_name

if TYPE_CHECKING:
    from ..model.model import Model
    from .concept import Concept

EMBEDDINGS = ("token_embedding", "position_embedding", "class_embedding")  # tables: their weights multiply nothing


def network(model: Model, part: Part) -> nn.Module:
    """The model's UNet or one of its text encoders. Raises ValueError where the model has no such part."""
    if part == UNET:
        return model.unet
    number = TEXT_PARTS.index(part)
    if number >= len(model.text_encoders):
        raise ValueError(f"this model has no part {part!r}")
    return model.text_encoders[number]


def parameters_of(model: Model, part: Part) -> dict[str, nn.Parameter]:
    """A network's parameters by the names that checkpoint files give them."""
    named = own_parameters(network(model, part))
    return {name if part == UNET else file_name(name): p for name, p in named}


def parts_of(model: Model) -> tuple[Part, ...]:
    """The parts that the model has: the UNet and one or two text encoders."""
    return PARTS[: 1 + len(model.text_encoders)]


def is_projection(path: str, weight: Tensor) -> bool:
    """Whether a low-rank residual can sit on the layer `path` of this weight."""
    name = path.rpartition(".")[2]
    if name in EMBEDDINGS:
        return False
    return weight.dim() == 2 or (weight.dim() == 4 and name in ("proj_in", "proj_out"))


class BaseWeights:
    """A base model's parameters, detached, by a concept's names for their whole values: "unet.conv_in.weight".

    Of a weight that is held in 8 bits they have the codes, and its shape; `value` reads it as it was.
    """

    def __init__(self, model: Model) -> None:
        self.parameters: dict[str, Tensor] = {
            value_name(part, name): p.detach()
            for part in parts_of(model)
            for name, p in parameters_of(model, part).items()
        }
        self._unet = model.unet

    def value(self, name: str) -> Tensor:
        """A parameter's value on the CPU, where concepts are: their algebra needs float64, which not all GPUs have."""
        slot = parse(name)
        layer = layer_in_8_bits(self._unet, slot.layer) if slot.part == UNET else None
        return (self.parameters[name] if layer is None else original(layer, self._unet.conv_in.weight)).cpu()

    def takes_residual(self, path: str) -> bool:
        """Whether a low-rank residual can sit on `part.module`: a linear layer or a transformer's 1x1 convolution."""
        weight = self.parameters.get(f"{path}.weight")
        return weight is not None and is_projection(path, weight)

    def tuned(self, concept: Concept, name: str) -> Tensor | None:
        """The value of the parameter `name` with the concept on it, in float64 on the CPU; None without a change of it.

        Args:
            concept: what changes it; its causal and context residuals change no parameter.
            name: as in `parameters`.
        """
        slot, own = parse(name), concept.tensors
        difference = difference_name(slot.part, slot.layer)
        down_name, up_name = pair_names(slot.part, slot.layer.removesuffix(".weight"))
        if not {name, difference, down_name} & own.keys():
            return None
        value = (own[name] if name in own else self.value(name)).double()
        if difference in own:
            value = value + own[difference].double().to(value.device)
        if down_name in own:
            down, up = own[down_name].double(), own[up_name].double()
            value = value + (up @ down).reshape(value.shape).to(value.device)
        return value
