"""Group normalisation and SiLU in pure torch.

x_hat = (x - mean) rstd over each (sample, group);  z = weight x_hat + bias;  y = z sigmoid(z) or z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dtypes import accumulator
from .op import Needs


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.reshape(x.shape[0], groups, -1)


def _per_channel(p: Tensor | None, x: Tensor, default: float) -> Tensor:
    """weight or bias as [C, 1, ..., 1] in the accumulation dtype."""
    p = x.new_full((x.shape[1],), default) if p is None else p
    return p.to(accumulator(x.dtype)).reshape(-1, *[1] * (x.dim() - 2))


def _like(y: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(y)


def forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _grouped(x, groups).to(accumulator(x.dtype))
    variance, mean = torch.var_mean(rows, dim=-1, correction=0)
    rstd = torch.rsqrt(variance + eps)
    x_hat = ((rows - mean[..., None]) * rstd[..., None]).reshape(x.shape)
    z = x_hat * _per_channel(weight, x, 1.0) + _per_channel(bias, x, 0.0)
    return _like(z * torch.sigmoid(z) if silu else z, x), mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz = dy silu'(z);  dx = rstd (weight dz - <weight dz> - x_hat <weight dz x_hat>), <> the mean over a group"""
    rows = _grouped(x, groups).to(accumulator(x.dtype))
    x_hat = ((rows - mean[..., None]) * rstd[..., None]).reshape(x.shape)
    w = _per_channel(weight, x, 1.0)
    dz = dy.to(x_hat.dtype)
    if silu:
        z = x_hat * w + _per_channel(bias, x, 0.0)
        s = torch.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    dx = dweight = dbias = x.new_empty(0)
    if needs.x:
        g, h = _grouped(dz * w, groups), _grouped(x_hat, groups)
        d = g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True)
        dx = _like((d * rstd[..., None]).reshape(x.shape), x)
    others = [d for d in range(x.dim()) if d != 1]
    if needs.weight and weight is not None:
        dweight = (dz * x_hat).sum(others).to(weight.dtype)
    if needs.bias and bias is not None:
        dbias = dz.sum(others).to(bias.dtype)
    return dx, dweight, dbias
