"""A UNet whose frozen weights wait in the machine's memory and pass through a ring on the device.

The same layers as those that may be held in 8 bits: what stays on the device is a hundredth of the bytes, and biases
and norms, which are smaller yet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pcs_kernels import StreamedWeight, WeightRing
from pcs_kernels.streaming import on_the_host

from .int8 import layers_for_8_bits, widen
from .layers import Conv2d, Linear, place
from .unet import UNet

RING = 4  # in largest weights: one in use, and three on their way


def waiting_weights(unet: UNet) -> list[nn.Parameter]:
    """Those that wait in the machine's memory, where the UNet's are streamed."""
    return [p for layer in layers_for_8_bits(unet).values() for p in _weights(layer)]


def ring_bytes(unet: UNet) -> int:
    """The ring's size for the weights as they are held; those of float16 are float32 while gradients are checked."""
    largest = 0
    for layer in layers_for_8_bits(unet).values():
        wide = 2 if layer.weight.dtype == torch.float16 else 1
        largest = max(largest, sum(wide * p.nbytes for p in _weights(layer)))
    return RING * (largest + 512)


def waiting_blocks(unet: UNet) -> list[list[nn.Parameter]]:
    """The same weights, in groups that lie in one block of the machine's memory: those that are one product."""
    groups = [group for stack in unet.stacks() for group in stack.groups]
    joined = {id(layer) for group in groups for layer in group}
    blocks = [[p] for layer in layers_for_8_bits(unet).values() if id(layer) not in joined for p in _weights(layer)]
    for group in groups:
        blocks.append([layer.weight for layer in group])
        blocks.append([layer.weight_scales for layer in group if layer.weight_scales is not None])
    return [block for block in blocks if block]


def stream(unet: UNet, ring: WeightRing) -> None:
    """Let the weights of a UNet wait in the machine's memory from now on; all else goes to the ring's device."""
    unet.ring = ring
    waiting = set(map(id, waiting_weights(unet)))
    for p in unet.parameters():
        if id(p) not in waiting and p.device != ring.device:
            place(p, p.data.to(ring.device))
    for layer in layers_for_8_bits(unet).values():
        layer.streamed = StreamedWeight(ring, *_weights(layer))
    for stack in unet.stacks():  # into the blocks in which they stay, before each has one of its own
        stack.refresh()
    for p in waiting_weights(unet):
        value = on_the_host(p.data, ring.device)
        if value.data_ptr() != p.data_ptr():
            place(p, value)


def settle(layer: Linear | Conv2d) -> Callable[[], None]:
    """Bring a streamed weight to the device to stay; what is returned sends it back to the ring."""
    streamed = layer.streamed
    assert streamed is not None
    waiting = [p.data for p in _weights(layer)]
    for p in _weights(layer):
        place(p, p.data.to(streamed.ring.device))
    layer.streamed = None

    def undo() -> None:
        for p, value in zip(_weights(layer), waiting, strict=True):
            place(p, value)
        layer.streamed = streamed

    return undo


def at_hand(unet: UNet, name: str) -> list[Callable[[], None]]:
    """Bring a frozen weight onto the device as its file has it, to be trained or replaced; what takes it back."""
    path, _, kind = name.rpartition(".")
    layer = unet.get_submodule(path) if kind == "weight" else None
    if not isinstance(layer, (Linear, Conv2d)):
        return []
    undo = [] if layer.streamed is None else [settle(layer)]
    return undo if layer.weight_scales is None else [*undo, widen(layer, unet.conv_in.weight)]


def _weights(layer: Linear | Conv2d) -> list[nn.Parameter]:
    return [p for p in (layer.weight, layer.weight_scales) if p is not None]
