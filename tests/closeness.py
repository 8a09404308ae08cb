"""The one tolerance rule of this project."""

from __future__ import annotations

import torch
from torch import Tensor


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.detach().double() - exact.detach().double()).abs().max()) if exact.numel() else 0.0


def assert_no_worse_than(actual: Tensor, exact: Tensor, low_precision: Tensor, name: str = "result") -> None:
    """`actual` errs at most twice what low-precision torch errs against the exact reference, plus a tiny floor.

    The floor is eight float32 roundings of the largest exact value: what the order of a sum may change.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{name} holds values that are not finite"
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    allowed = 2 * error(low_precision, exact) + 8 * torch.finfo(torch.float32).eps * largest
    found = error(actual, exact)
    assert found <= allowed, f"{name} errs by {found:.3e}; low-precision torch allows {allowed:.3e}"
