"""trained_conv2d, trained_linear: a convolution and a linear product whose weight trains.

    y = conv2d(x, weight) + bias    x [B, C_in, H, W]; weight [C_out, C_in, K, K]; bias [C_out] -> y [B, C_out, H', W']
    y = x weight^T + bias           x [..., C_in]; weight [C_out, C_in]; bias [C_out] -> y [..., C_out]

C++, if it is asked for, on a CPU without bfloat16; on others a product over the unfolded input where a weight
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


def _native_product(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> ModuleType | None:
    """The C++ one where it takes this call, and nobody looks at torch's operations; torch refuses what is wrong."""
    given = (x, weight) if bias is None else (x, weight, bias)
    if any(type(t) not in TENSORS or t.device.type != "cpu" or t.dtype != torch.bfloat16 for t in given):
        return None
    # Only where it is asked for: frozen and trained products of one network must round alike, which they do not yet.
    if forced_backend() != "native" or torch.compiler.is_compiling() or changed():
        return None
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] or not x.numel() or not weight.numel():
        return None
    whole = type(stride) is type(padding) is int and stride > 0 <= padding
    if not whole or any(n + 2 * padding < k for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)):
        return None
    native = _native() if bias is None or bias.shape == weight.shape[:1] else None
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
    native = _native_product(x, weight, bias, stride, padding)
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
    if isinstance(x, Tensor) and x.dim() and isinstance(weight, Tensor) and weight.dim() == 2 and x.numel():
        image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # a row of pixels, channels last
        kernel = weight[..., None, None]
        native = _native_product(image, kernel, bias, 1, 0)
        if native is not None and type(x) in TENSORS and type(weight) in TENSORS:
            y = native.Convolution.apply(image, kernel, bias, 1, 0)  # [1, C_out, 1, rows]
            return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)
