"""A UNet's frozen weights in 8 bits, made while its files are read: the 16-bit network is never in memory whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from ..unet.int8 import SCALES, expect_8_bits, hold, layers_for_8_bits, quantized
from ..unet.unet import UNet
from .fingerprint import fingerprint_of
from .weights import load_weights, read_tensor


def load_in_8_bits(unet: UNet, files: list[Path], dtype: torch.dtype | None, device: str) -> None:
    """Give a UNet that was built on the meta device its weights, those of its inner layers in 8 bits.

    Each such layer knows where to read its weight as it was.
    """
    layers = {f"{name}.weight": layer for name, layer in layers_for_8_bits(unet).items()}
    expect_8_bits(unet)

    def converted(name: str, tensor: Tensor, file: Path) -> dict[str, Tensor]:
        layers[name].original = partial(read_tensor, file, name)
        codes, scales = quantized(tensor)
        _check_finite(scales, f"{file}: tensor {name!r}")
        return {name: codes, name.removesuffix("weight") + SCALES: scales}

    load_weights(unet, files, dtype, device, converted={name: partial(converted, name) for name in layers})


def in_8_bits(unet: UNet) -> UNet:
    """The same UNet with the weights of its inner layers in 8 bits, one layer after the other."""
    fingerprint_of(unet)  # a converted checkpoint has no tensors to read again: what tells it apart is kept from now on
    for name, layer in layers_for_8_bits(unet).items():
        weight = quantized(layer.weight.detach())
        _check_finite(weight.scales, f"the tensor '{name}.weight'")
        hold(layer, weight)
    return unet


def _check_finite(scales: Tensor, where: str) -> None:
    if scales.device.type != "meta" and not bool(scales.view(torch.bfloat16).isfinite().all()):
        raise UnsupportedModel(f"{where} holds values that are NaN or infinite")
