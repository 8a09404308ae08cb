"""What frozen_conv2d and frozen_linear ask of their arguments, one sentence for each that is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _check as check
from ..int8_weight import Int8Weight, check_int8

Weight = Tensor | Int8Weight


def _elements(weight: Weight) -> Tensor:
    """The tensor that has the weight's shape."""
    return weight.codes if isinstance(weight, Int8Weight) else weight


def _agree(x: Tensor, weight: Tensor, bias: Tensor | None, dims: int) -> bool:
    """Whether `_check_weights` finds nothing, at once: one by one they take longer than the launch."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and weight.dim() == dims):
        return False
    operands: tuple[Tensor, ...] = (x, weight)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]:
            return False
        operands = (x, weight, bias)
    dtype, device = x.dtype, x.device
    return (
        dtype in check.FLOATS
        and x.numel() > 0
        and weight.numel() > 0
        and all(t.dtype == dtype and t.device == device and t.layout == torch.strided for t in operands)
    )


def _check_weights(x: Tensor, weight: Weight, bias: Tensor | None, dims: int, letters: str) -> None:
    if not isinstance(weight, Int8Weight) and _agree(x, weight, bias, dims):
        return
    check.floating("x", x)
    check.not_empty("x", x)
    if isinstance(weight, Int8Weight):
        check_int8(*weight)
        check.rank("weight", weight.codes, dims, letters)
        check.same_device("weight", weight.codes, "x", x)
        weight = weight.codes
    else:
        check.floating("weight", weight)
        check.rank("weight", weight, dims, letters)
        check.not_empty("weight", weight)
        check.same("weight", weight, "x", x)
    if bias is not None:
        check.floating("bias", bias)
        check.shape("bias", bias, (weight.shape[0],), "[O]")
        check.same("bias", bias, "x", x)


def check_conv(x: Tensor, weight: Weight, bias: Tensor | None, stride: int, padding: int) -> None:
    _check_weights(x, weight, bias, 4, "[O, C, kh, kw]")
    weight = _elements(weight)
    check.rank("x", x, 4, "[B, C, H, W]")
    check.require(
        x.shape[1] == weight.shape[1],
        lambda: f"x has {x.shape[1]} channels but weight takes {weight.shape[1]}: {tuple(weight.shape)}",
    )
    check.require(stride >= 1, lambda: f"stride must be at least 1, not {stride}")
    largest = max(weight.shape[2:])
    check.require(0 <= padding <= largest, lambda: f"padding must be from 0 to the kernel's {largest}, not {padding}")
    for letter, size, kernel in (("H", x.shape[2], weight.shape[2]), ("W", x.shape[3], weight.shape[3])):
        check.require(
            size + 2 * padding >= kernel,
            lambda: f"x is smaller than the kernel of weight: {letter} = {size} + 2 x {padding} < {kernel}",
        )


def check_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    _check_weights(x, weight, bias, 2, "[O, C]")
    weight = _elements(weight)
    check.require(x.dim() >= 1, lambda: "x must be [..., C], not a scalar")
    check.require(
        x.shape[-1] == weight.shape[1],
        lambda: f"x has {x.shape[-1]} channels last but weight takes {weight.shape[1]}: {tuple(weight.shape)}",
    )
