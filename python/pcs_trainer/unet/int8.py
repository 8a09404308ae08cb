"""Frozen weights of a UNet in 8 bits: which layers hold them, and how one of them gets its 16 or 32 bits back.

The first and the last layer and the embeddings of times, sizes and classes stay as they are: they are a hundredth of
the bytes, and the whole prediction passes through each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import pcs_kernels

from .layers import Conv2d, Linear, replace_data

if TYPE_CHECKING:
    from .unet import UNet

KEPT = ("conv_in", "conv_out", "time_embedding", "add_embedding", "class_embedding")
SCALES = "weight_scales"


def layers_for_8_bits(unet: nn.Module) -> dict[str, Linear | Conv2d]:
    """The layers whose weights may be held in 8 bits, by name."""
    return {
        name: layer
        for name, layer in unet.named_modules()
        if isinstance(layer, (Linear, Conv2d)) and name.partition(".")[0] not in KEPT
    }


def expect_8_bits(unet: nn.Module) -> None:
    """Codes and scales without contents in the place of weights, on a UNet that waits for its weights."""
    for layer in layers_for_8_bits(unet).values():
        hold(layer, quantized(layer.weight.detach()))


def quantized(weight: Tensor) -> pcs_kernels.Int8Weight:
    """A weight in 8 bits. The CPU's own kernel reads bfloat16 and float32."""
    reads = weight.dtype == torch.bfloat16 or weight.device.type != "cpu"
    return pcs_kernels.quantize_weight(weight if reads else weight.float())


def hold(layer: Linear | Conv2d, weight: pcs_kernels.Int8Weight) -> None:
    """Give a frozen layer this weight."""
    codes, scales = weight
    if layer.weight.device == codes.device:
        layer.weight.requires_grad_(False)
        replace_data(layer.weight, codes)
    else:
        layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.weight_scales = nn.Parameter(scales, requires_grad=False)
    if layer.streamed is not None:
        layer.streamed = pcs_kernels.StreamedWeight(layer.streamed.ring, layer.weight, layer.weight_scales)


def original(layer: Linear | Conv2d, like: Tensor) -> Tensor:
    """The weight before it was quantized, as the model's file has it, on the device and in the dtype of `like`.

    Of a layer without a file it is what the codes stand for.
    """
    if layer.weight_scales is None:
        return layer.weight.detach()
    if layer.original is None:
        return pcs_kernels.expand_weight(pcs_kernels.Int8Weight(layer.weight.detach(), layer.weight_scales), like.dtype)
    return layer.original().to(device=like.device, dtype=like.dtype)


def widen(layer: Linear | Conv2d, like: Tensor) -> Callable[[], None]:
    """Give a layer its original weight back, in the dtype of `like`; what is returned puts the 8 bits in its place."""
    codes, scales = layer.weight.data, layer.weight_scales
    replace_data(layer.weight, original(layer, like))
    layer.weight_scales = None

    def undo() -> None:
        replace_data(layer.weight, codes)
        layer.weight_scales = scales

    return undo


class AsFiled(pcs_kernels.StreamedWeight):
    """A weight that is read from its file for each use, as it was before it was quantized."""

    def __init__(self, layer: Linear | Conv2d, ring: pcs_kernels.WeightRing, like: Tensor) -> None:
        self.layer, self.ring, self.like, self.sources = layer, ring, like, (layer.weight,)

    def take(self) -> Tensor:
        """The weight."""
        return original(self.layer, self.like)


@contextmanager
def as_filed(unet: UNet) -> Iterator[None]:
    """Let a UNet in 8 bits compute with the weights of its files, one layer at a time."""
    like, layers = unet.conv_in.weight, [x for x in layers_for_8_bits(unet).values() if x.weight_scales is not None]
    kept, none = [layer.streamed for layer in layers], pcs_kernels.WeightRing(like.device, 0)
    unet.forget_derived()
    unet.join_layers(False)
    try:
        for layer in layers:
            layer.streamed = AsFiled(layer, none, like)
        yield
    finally:
        for layer, before in zip(layers, kept, strict=True):
            layer.streamed = before
        unet.join_layers(True)
        unet.forget_derived()


def distance_from_file(unet: UNet, run: Callable[[], Any]) -> float | None:
    """How far the predictions that `run` makes are from those of the files' weights; None where no file has these."""
    layers = [layer for layer in layers_for_8_bits(unet).values() if layer.weight_scales is not None]
    if not layers or any(layer.original is None for layer in layers):
        return None
    made: list[Tensor] = []
    handle = unet.register_forward_hook(lambda _, __, out: made.append(out.detach().float()))
    try:
        with torch.no_grad():
            run()
            mine = made.pop()
            with as_filed(unet):
                run()
    finally:
        handle.remove()
    return float((mine - made[-1]).norm() / made[-1].norm())


def layer_in_8_bits(unet: nn.Module, name: str) -> Linear | Conv2d | None:
    """The layer that holds the parameter `name` in 8 bits; None where it is held as it is."""
    path, _, kind = name.rpartition(".")
    layer = unet.get_submodule(path) if kind == "weight" else None
    return layer if isinstance(layer, (Linear, Conv2d)) and layer.weight_scales is not None else None


def own_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that the network's files name: not the scales of 8-bit weights."""
    return ((name, p) for name, p in network.named_parameters() if not name.endswith(SCALES))
