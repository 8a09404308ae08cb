"""trained_conv2d, trained_linear: a convolution and a linear product whose weight trains.

    y = conv2d(x, weight) + bias    x [B, C_in, H, W]; weight [C_out, C_in, K, K]; bias [C_out] -> y [B, C_out, H', W']
    y = x weight^T + bias           x [..., C_in]; weight [C_out, C_in]; bias [C_out] -> y [..., C_out]

C++ on a CPU that does not multiply bfloat16; on others a product over the unfolded input where a weight
is larger than that; else torch's own, the reference. Kept for the backward: x.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._direct import TENSORS, changed
from ..._dispatch import forced_backend
from .unfolding import Unfolded


@functools.cache
def _native() -> ModuleType | None:
    try:
        return importlib.import_module(f"{__package__}.native_impl")
    except ImportError:  # no C++ build: its sentence is that of every other op
        return None


def _native_convolution(x: Tensor, weight: Tensor) -> ModuleType | None:
    """The C++ one where it takes this call, and nobody looks at torch's operations."""
    if type(x) not in TENSORS or x.device.type != "cpu" or x.dtype != torch.bfloat16 or not x.numel():
        return None
    if forced_backend() == "reference" or torch.compiler.is_compiling() or changed():
        return None
    native = _native()
    return native if native is not None and native.takes(x, weight) else None


def trained_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> Tensor:
    """A convolution with gradients for x, weight and bias, all of one dtype.

    Args:
        x: [B, C_in, H, W].
        weight: [C_out, C_in, K, K]; in channels-last memory it is never copied, and its gradient comes in the same.
        bias: [C_out] or None.
        stride: of both sides.
        padding: of both sides, with zeros.

    Returns:
        [B, C_out, H', W'].
    """
    native = _native_convolution(x, weight)
    if native is not None:
        y: Tensor = native.Convolution.apply(x, weight, bias, stride, padding)
        return y
    positions = x.shape[0] * (x.shape[2] // stride) * (x.shape[3] // stride)
    # up to as many positions as output channels, the unfolded input [positions, K K C_in] is no larger than the weight
    small = x.device.type == "cpu" and x.dtype == torch.bfloat16 and positions <= weight.shape[0]
    if small and forced_backend() != "reference":
        return Unfolded.apply(x, weight, bias, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding)


def trained_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., C_in] weight^T + bias -> [..., C_out], with gradients for all three, of one dtype."""
    native = _native_convolution(x, weight)
    if native is None:
        return F.linear(x, weight, bias)
    image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # a row of pixels, channels last
    y = native.Convolution.apply(image, weight[..., None, None], bias, 1, 0)  # [1, C_out, 1, rows]
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])
