"""geglu: y = x[..., :F] * gelu(x[..., F:]), the gate of the UNet's feed-forward, with the exact gelu.

x [..., 2F] -> y [..., F].  Kept for the backward: x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _check as check
from ..._dispatch import Op, define, forced_backend

OP = Op("geglu", __package__)


def _check_x(x: Tensor) -> None:
    check.floating("x", x)
    check.require(x.dim() >= 1, lambda: "x must be [..., 2F], not a scalar")
    check.require(x.shape[-1] % 2 == 0, lambda: f"x must have an even last dimension [..., 2F], not {tuple(x.shape)}")
    check.not_empty("x", x)


def _choose(x: Tensor, backend: str) -> Any:
    _check_x(x)
    return OP.select(backend, x.device.type, x)


def _forward(chosen: Any, x: Tensor, backend: str) -> Tensor:
    return chosen.forward(x)


def _forward_fake(x: Tensor, backend: str) -> Tensor:
    _check_x(x)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _choose_backward(dy: Tensor, x: Tensor, backend: str) -> Any:
    return OP.select(backend, x.device.type, x)


def _backward(chosen: Any, dy: Tensor, x: Tensor, backend: str) -> Tensor:
    return chosen.backward(dy, x)


def _backward_fake(dy: Tensor, x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


_FORWARD = define("geglu_forward(Tensor x, str backend) -> Tensor", _forward, _forward_fake, choose=_choose)
_BACKWARD = define(
    "geglu_backward(Tensor dy, Tensor x, str backend) -> Tensor", _backward, _backward_fake, choose=_choose_backward
)


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backend = backend
        return _FORWARD(x, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _BACKWARD(dy, x, ctx.backend), None


def geglu(x: Tensor) -> Tensor:
    """The gate of a feed-forward, x[..., :F] * gelu(x[..., F:]), with the exact gelu; differentiable.

    Args:
        x: [..., 2F].

    Returns:
        [..., F].
    """
    if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
        return _Geglu.apply(x, forced_backend())
    return _FORWARD(x, forced_backend())
