"""group_norm_silu: GroupNorm, then SiLU, in one pass over memory each way.

x [B, C, *spatial] -> y of x's shape and memory format.  Kept for the backward: x, mean and rstd [B, groups].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _check as check
from ..._dispatch import Op, define, forced_backend
from ..._dtypes import accumulator

OP = Op("group_norm_silu", __package__)


class Needs(NamedTuple):
    """Which gradients a backward must compute."""

    x: bool
    weight: bool
    bias: bool


def _check_call(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check.floating("x", x)
    check.require(x.dim() >= 3, lambda: f"x must be [B, C, *spatial], not of shape {tuple(x.shape)}")
    check.not_empty("x", x)
    check.require(
        groups > 0 and x.shape[1] % groups == 0, lambda: f"groups = {groups} must divide the {x.shape[1]} channels of x"
    )
    check.finite("eps", eps)
    check.require(eps >= 0, lambda: f"eps must not be negative: {eps}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            check.floating(name, p)
            check.shape(name, p, (x.shape[1],), "[C]")
            check.dtype_in(name, p, (x.dtype, torch.float32))
            check.same_device(name, p, "x", x)


def _choose(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, backend: str
) -> Any:
    _check_call(x, groups, weight, bias, eps)
    return OP.select(backend, x.device.type, x, groups, weight, bias, eps, silu)


def _forward(chosen: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return chosen.forward(*args[:-1])


def _forward_fake(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    _check_call(x, groups, weight, bias, eps)
    statistics = x.new_empty((x.shape[0], groups), dtype=accumulator(x.dtype))
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


def _choose_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> Any:
    return OP.select(backend, x.device.type, x, groups, weight, bias, 0.0, silu)


def _backward(chosen: Any, *args: Any) -> tuple[Tensor, ...]:
    return chosen.backward(*args[:8], Needs(*args[8:11]))


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    def gradient(needed: bool, p: Tensor | None) -> Tensor:
        return torch.empty_like(p) if needed and p is not None else x.new_empty(0)

    return gradient(need_x, x), gradient(need_weight, weight), gradient(need_bias, bias)


_FORWARD = define(
    "group_norm_silu_forward(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, bool silu, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    choose=_choose,
)
_BACKWARD = define(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, int groups, Tensor? weight, Tensor? bias,"
    " bool silu, bool need_x, bool need_weight, bool need_bias, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    choose=_choose_backward,
)


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        silu: bool,
        backend: str,
    ) -> Tensor:
        y, mean, rstd = _FORWARD(x, groups, weight, bias, eps, silu, backend)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.settings = groups, silu, backend
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        groups, silu, backend = ctx.settings
        need_x, _, need_weight, need_bias = ctx.needs_input_grad[:4]
        needs = need_x, need_weight, need_bias
        gradients = _BACKWARD(dy, x, mean, rstd, groups, weight, bias, silu, *needs, backend)
        dx, dweight, dbias = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return dx, None, dweight, dbias, None, None, None


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "silu",
) -> Tensor:
    """GroupNorm, then SiLU or nothing, differentiable; statistics in float32.

    Args:
        x: [B, C, *spatial], contiguous or channels-last.
        groups: must divide C.
        weight: [C] in x's dtype or float32; default: 1.
        bias: [C] likewise; default: 0.
        eps: added to the variance.
        activation: "silu" or None.

    Returns:
        A tensor of x's shape, dtype and memory format.
    """
    check.require(activation in ("silu", None), lambda: f'activation must be "silu" or None, not {activation!r}')
    silu = activation == "silu"
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, weight, bias)):
        return _GroupNormSilu.apply(x, groups, weight, bias, eps, silu, forced_backend())
    return _FORWARD(x, groups, weight, bias, eps, silu, forced_backend())[0]
