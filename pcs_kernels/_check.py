"""The argument checks that all ops share; each message names the argument and what it should be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def require(ok: bool, message: Callable[[], str]) -> None:
    if not ok:
        raise ValueError(message())


def require_type(ok: bool, message: Callable[[], str]) -> None:
    if not ok:
        raise TypeError(message())


def require_index(ok: bool, message: Callable[[], str]) -> None:
    if not ok:
        raise IndexError(message())


def tensor(name: str, x: object) -> None:
    require_type(isinstance(x, Tensor), lambda: f"{name} must be a torch.Tensor, not {type(x).__name__}")


def floating(name: str, x: Tensor) -> None:
    tensor(name, x)
    require_type(x.dtype in FLOATS, lambda: f"{name} must be float32, float16, bfloat16 or float64, not {x.dtype}")
    dense(name, x)


def dense(name: str, x: Tensor) -> None:
    require_type(
        x.layout == torch.strided, lambda: f"{name} must be a dense strided tensor, not {x.layout}. Fix: .to_dense()"
    )


def rank(name: str, x: Tensor, dims: int, letters: str) -> None:
    require(x.dim() == dims, lambda: f"{name} must be {letters}, not of shape {tuple(x.shape)}")


def not_empty(name: str, x: Tensor) -> None:
    require(x.numel() > 0, lambda: f"{name} is empty: its shape is {tuple(x.shape)}")


def shape(name: str, x: Tensor, wanted: tuple[int, ...], letters: str) -> None:
    require(
        tuple(x.shape) == tuple(wanted),
        lambda: f"{name} must be {letters} = {tuple(wanted)}, not {tuple(x.shape)}",
    )


def same(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    require_type(
        x.dtype == other.dtype, lambda: f"{name} is {x.dtype} but {other_name} is {other.dtype}. Fix: cast one of them"
    )
    same_device(name, x, other_name, other)


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    require(x.device == other.device, lambda: f"{name} is on {x.device} but {other_name} is on {other.device}")


def dtype_in(name: str, x: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    require_type(x.dtype in allowed, lambda: f"{name} must be {' or '.join(map(str, allowed))}, not {x.dtype}")


def number(name: str, value: object) -> float:
    """`value` as a float; anything but an int or a float is refused."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    return float(value)


def finite(name: str, value: float) -> None:
    require(value == value and abs(value) != float("inf"), lambda: f"{name} must be a finite number, not {value}")


def positive(name: str, value: float) -> None:
    require(value > 0, lambda: f"{name} must be above 0, not {value}")


def attention_scale(scale: object, q: Tensor) -> float:
    """The given scale, or D ** -0.5."""
    if scale is not None:
        return number("scale", scale)
    return max(q.shape[-1], 1) ** -0.5 if q.dim() else 1.0
