"""Frozen convolution and linear product on the CPU: oneDNN with the weight packed once for each direction.

oneDNN re-orders a plain weight on every call, which costs more than the product where the weight is large. The
input gradient of a convolution is a convolution too, with the flipped, transposed weight (stride 1) or a transposed
one (larger strides), so it is packed as well. Where oneDNN has no instructions for bfloat16, and for 8-bit weights,
`native_product` reads the weight as it lies, and packs none.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ... import _native
from ..._layout import image_format
from ..._packed import packed
from ..int8_weight import Int8Weight
from . import native_product, reference

_mkldnn = torch.ops.mkldnn


def reason(x: Tensor, weight: Tensor) -> str | None:
    sentence = _native.reason(x, weight)
    if sentence is None and not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    return sentence


def product_of_codes(x: Tensor, weight: Int8Weight) -> ModuleType | None:
    """What multiplies an 8-bit weight without expanding it first, where that is the faster."""
    return native_product if _native.reason(x) is None and native_product.takes(x, weight) else None


def packs(weight: Tensor) -> bool:
    """Whether a weight would be packed."""
    return not native_product.takes(weight, weight)


def _dense(x: Tensor) -> Tensor:
    """oneDNN reads strides of plain and channels-last tensors only; anything else is copied first."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous(memory_format=image_format(x)) if x.dim() == 4 else x.contiguous()


def forward_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, pack: bool) -> Tensor:
    if native_product.takes(x, weight):
        return native_product.forward_conv(x, weight, bias, stride, padding)
    if not pack:
        return reference.forward_conv(x, weight, bias, stride, padding, pack)
    return _convolve(x, weight, "forward", _as_it_is, bias, stride, padding)


def backward_conv(dy: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: int, pack: bool) -> Tensor:
    if native_product.takes(dy, weight):
        return native_product.backward_conv(dy, weight, height, width, stride, padding)
    dy, kernel = _dense(dy), weight.shape[-1]
    if not pack or weight.shape[-2] != kernel or padding >= kernel:
        return reference.backward_conv(dy, weight, height, width, stride, padding, pack)
    if stride == 1:
        return _convolve(dy, weight, "backward", _flipped, None, 1, kernel - 1 - padding)
    # rows and columns that the last step of the kernel did not reach
    rest = [(size + 2 * padding - kernel) % stride for size in (height, width)]
    numbers = [padding] * 2, rest, [stride] * 2, [1, 1], 1

    def pack_transposed(weight: Tensor) -> Tensor:
        return _mkldnn._reorder_convolution_transpose_weight(weight.contiguous(), *numbers, list(dy.shape))

    w = packed(weight, ("transposed", stride, padding), pack_transposed, variant=tuple(dy.shape) + tuple(rest))
    return _mkldnn._convolution_transpose_pointwise(dy, w, None, *numbers, "none", [], "")


def _flipped(weight: Tensor) -> Tensor:
    return weight.flip(2, 3).transpose(0, 1).contiguous()


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _transposed(weight: Tensor) -> Tensor:
    return weight.t().contiguous()


def _convolve(
    x: Tensor,
    weight: Tensor,
    direction: str,
    turn: Callable[[Tensor], Tensor],
    bias: Tensor | None,
    stride: int,
    padding: int,
) -> Tensor:
    x, bias = _dense(x), None if bias is None else bias.contiguous()
    numbers = [padding] * 2, [stride] * 2, [1, 1], 1

    def pack(weight: Tensor) -> Tensor:
        return _mkldnn._reorder_convolution_weight(turn(weight).contiguous(), *numbers, list(x.shape))

    w = packed(weight, (direction, stride, padding), pack, variant=tuple(x.shape))
    return _mkldnn._convolution_pointwise(x, w, bias, *numbers, "none", [], "")


def forward_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pack: bool) -> Tensor:
    if native_product.takes(x, weight):
        return native_product.forward_linear(x, weight, bias)
    if not pack:
        return reference.forward_linear(x, weight, bias, pack)
    return _product(x, weight, "forward", _as_it_is, bias)


def backward_linear(dy: Tensor, weight: Tensor, pack: bool) -> Tensor:
    if native_product.takes(dy, weight):
        return native_product.backward_linear(dy, weight)
    if not pack:
        return reference.backward_linear(dy, weight, pack)
    return _product(dy, weight, "backward", _transposed, None)


def _product(
    x: Tensor, weight: Tensor, direction: str, turn: Callable[[Tensor], Tensor], bias: Tensor | None
) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    rows = x.numel() // x.shape[-1]

    def pack(weight: Tensor) -> Tensor:
        return _mkldnn._reorder_linear_weight(turn(weight).contiguous(), rows)

    w = packed(weight, direction, pack, variant=rows)
    return _mkldnn._linear_pointwise(x, w, bias, "none", [], "")
