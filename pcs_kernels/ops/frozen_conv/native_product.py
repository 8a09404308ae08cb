"""Convolution and linear product with a weight that the CPU reads as it lies: csrc/frozen_product.cpp.

For bfloat16 on CPUs that do not multiply it, where oneDNN computes at a third of its float32's speed or, without
AVX-512, not at all; and for 8-bit weights there, and with float32. One form serves both directions, so that no packed
copy is made. Sums are float32.
"""

from __future__ import annotations

import functools
import importlib
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _check as check
from ... import _native
from ..._layout import image_format
from ..int8_weight import Int8Weight

LIBRARY = _native.library()
Weight = Tensor | Int8Weight
Image = tuple[int, int, int]  # B, H, W


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether oneDNN has this CPU's own instructions for products of bfloat16."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return importlib.import_module("pcs_kernels._cpuid").best() in ("avx512", "amx")
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def takes(x: Tensor, weight: Weight) -> bool:
    """Whether this product is faster here than another with a weight of this kind."""
    slow = x.dtype == torch.bfloat16 and not multiplies_bfloat16()
    return slow or (isinstance(weight, Int8Weight) and x.dtype == torch.float32)


def _in_order(weight: Tensor) -> tuple[Tensor, bool]:
    """The weight without gaps, and whether its taps are neighbours in memory: [O, C, kh, kw]."""
    weight = weight.resolve_neg()
    if weight.dim() == 2 or weight.shape[2:].numel() == 1:
        return weight.contiguous(), False
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight, False
    return weight.contiguous(), True


def _multiply(
    given: Tensor,
    weight: Weight,
    bias: Tensor | None,
    out: Tensor,
    image: Image,
    size: tuple[int, int],
    stride: int,
    padding: int,
    backward: bool,
) -> Tensor:
    """out from given, both with channels last; `image` is the forward's input and `size` its output."""
    coded = isinstance(weight, Int8Weight)
    whole, taps_last = (weight.codes, False) if isinstance(weight, Int8Weight) else _in_order(weight)
    scales = weight.scales.contiguous() if isinstance(weight, Int8Weight) else None
    bias = None if bias is None else bias.resolve_neg().contiguous()
    outs, ins, *kernel = whole.shape if whole.dim() == 4 else (*whole.shape, 1, 1)
    batch, height, width = image
    _check(given, whole if not coded else None, outs if backward else ins, image, size, kernel, stride, padding)
    LIBRARY.frozen_product(
        _native.dtype_code(given),
        int(coded),
        tuple(map(_native.address, (given, whole, scales, bias, out))),
        (batch, height, width, ins, outs, *size, *kernel, stride, padding),
        backward,
        taps_last,
        _native.threads(),
    )
    return out


def _check(
    given: Tensor,
    weight: Tensor | None,
    channels: int,
    image: Image,
    size: tuple[int, int],
    kernel: Sequence[int],
    stride: int,
    padding: int,
) -> None:
    """What memory is read and written by: callers of the registered ops may pass anything."""
    found = given.shape[1] if len(given.shape) == 4 else given.shape[-1]
    check.require(found == channels, lambda: f"the tensor has {found} channels where the weight has {channels}")
    check.require(
        weight is None or weight.dtype == given.dtype,
        lambda: f"the tensor is {given.dtype}, the weight is not",
    )
    sides = zip(image[1:], kernel, size, strict=True)
    fits = all((side + 2 * padding - taps) // stride + 1 == out for side, taps, out in sides)
    check.require(fits and min(size) > 0, lambda: f"an image of {image[1:]} does not give {size} through this kernel")


def _channels_last(x: Tensor) -> Tensor:
    return x.resolve_neg().contiguous(memory_format=torch.channels_last)


def forward_conv(x: Tensor, weight: Weight, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    outs, _, kernel_h, kernel_w = _shape(weight)
    batch, _, height, width = x.shape
    size = (height + 2 * padding - kernel_h) // stride + 1, (width + 2 * padding - kernel_w) // stride + 1
    y = torch.empty((batch, outs, *size), dtype=x.dtype, memory_format=torch.channels_last)
    _multiply(_channels_last(x), weight, bias, y, (batch, height, width), size, stride, padding, backward=False)
    return y.contiguous(memory_format=image_format(x))


def backward_conv(dy: Tensor, weight: Weight, height: int, width: int, stride: int, padding: int) -> Tensor:
    batch, size = dy.shape[0], (dy.shape[2], dy.shape[3])
    shape = batch, _shape(weight)[1], height, width
    dx = torch.empty(shape, dtype=dy.dtype, memory_format=torch.channels_last)
    image = batch, height, width
    _multiply(_channels_last(dy), weight, None, dx, image, size, stride, padding, backward=True)
    return dx.contiguous(memory_format=image_format(dy))


def forward_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    rows, y = x.numel() // x.shape[-1], x.new_empty((*x.shape[:-1], _shape(weight)[0]))
    return _multiply(x.resolve_neg().contiguous(), weight, bias, y, (1, 1, rows), (1, rows), 1, 0, backward=False)


def backward_linear(dy: Tensor, weight: Weight) -> Tensor:
    rows, dx = dy.numel() // dy.shape[-1], dy.new_empty((*dy.shape[:-1], _shape(weight)[1]))
    return _multiply(dy.resolve_neg().contiguous(), weight, None, dx, (1, 1, rows), (1, rows), 1, 0, backward=True)


def weight_gradient(x: Tensor, dy: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Of a convolution's weight [O, C, kh, kw], in the order in which the weight lies."""
    batch, ins, height, width = x.shape
    in_order = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    dw = torch.empty_like(weight) if in_order else torch.empty(weight.shape, dtype=weight.dtype)
    x, dy = _channels_last(x), _channels_last(dy)
    LIBRARY.weight_gradient(
        _native.dtype_code(x),
        *map(_native.address, (x, dy, dw)),
        (batch, height, width, ins, dy.shape[1], *dy.shape[2:], *weight.shape[2:], stride, padding),
        dw.is_contiguous(),
        _native.threads(),
    )
    return dw


def _shape(weight: Weight) -> torch.Size:
    return weight.codes.shape if isinstance(weight, Int8Weight) else weight.shape
