"""The one tolerance rule of this project."""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 32  # values


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.detach().double() - exact.detach().double()).abs().max()) if exact.numel() else 0.0


def allowed(actual: Tensor, exact: Tensor, low_precision: Tensor) -> float:
    """Twice what low-precision torch errs against the exact reference, plus a tiny floor.

    The floor is eight float32 roundings of the largest exact value: what the order of a sum may change. Of few values,
    torch's largest error may be small by luck, so that two operands' roundings, half a unit of the dtype each, come on
    top: of 20,000 gradients of 3 values, each one product of three numbers in float16, 6 % broke twice torch's error by
    another order of the same roundings and 0.01 % this; with an operand in bfloat16 instead 70 % and 37 %.
    """
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    few = torch.finfo(actual.dtype).eps if exact.numel() < FEW else 0.0
    return 2 * error(low_precision, exact) + (8 * torch.finfo(torch.float32).eps + few) * largest


def assert_no_worse_than(actual: Tensor, exact: Tensor, low_precision: Tensor, name: str = "result") -> None:
    """`actual` errs no more than `allowed`."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{name} holds values that are not finite"
    found, limit = error(actual, exact), allowed(actual, exact, low_precision)
    assert found <= limit, f"{name} errs by {found:.3e}; low-precision torch allows {limit:.3e}"
