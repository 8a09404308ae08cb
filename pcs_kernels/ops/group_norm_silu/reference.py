"""Group normalisation and SiLU in pure torch; B samples, C channels, S pixels, G groups.

x_hat = (x - mean) rstd over each (sample, group);  z = weight x_hat + bias;  y = z sigmoid(z) or z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dtypes import accumulator
from .op import Needs


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.reshape(x.shape[0], groups, -1)  # [B, G, C / G * S]


def _per_channel(p: Tensor | None, x: Tensor, default: float) -> Tensor:
    """weight or bias as [C, 1, ..., 1] in the accumulation dtype."""
    p = x.new_full((x.shape[1],), default) if p is None else p  # [C]
    return p.to(accumulator(x.dtype)).reshape(-1, *[1] * (x.dim() - 2))  # [C, 1, ..., 1]


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y in x's dtype and memory format."""
    return torch.empty_like(x).copy_(y)  # [B, C, *spatial]


def forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _grouped(x, groups).to(accumulator(x.dtype))  # [B, G, C / G * S]
    variance, mean = torch.var_mean(rows, dim=-1, correction=0)  # [B, G] each
    rstd = torch.rsqrt(variance + eps)  # [B, G]
    x_hat = ((rows - mean[..., None]) * rstd[..., None]).reshape(x.shape)  # [B, C, *spatial]
    z = x_hat * _per_channel(weight, x, 1.0) + _per_channel(bias, x, 0.0)  # [B, C, *spatial]
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
    rows = _grouped(x, groups).to(accumulator(x.dtype))  # [B, G, C / G * S]
    x_hat = ((rows - mean[..., None]) * rstd[..., None]).reshape(x.shape)  # [B, C, *spatial]
    w = _per_channel(weight, x, 1.0)  # [C, 1, ..., 1]
    dz = dy.to(x_hat.dtype)  # [B, C, *spatial]
    if silu:
        z = x_hat * w + _per_channel(bias, x, 0.0)  # [B, C, *spatial]
        s = torch.sigmoid(z)  # [B, C, *spatial]
        dz = dz * s * (1 + z * (1 - s))  # [B, C, *spatial]
    dx = dweight = dbias = x.new_empty(0)
    if needs.x:
        g, h = _grouped(dz * w, groups), _grouped(x_hat, groups)  # [B, G, C / G * S] each
        d = g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True)  # [B, G, C / G * S]
        dx = _like((d * rstd[..., None]).reshape(x.shape), x)  # [B, C, *spatial]
    others = [d for d in range(x.dim()) if d != 1]
    if needs.weight and weight is not None:
        dweight = (dz * x_hat).sum(others).to(weight.dtype)  # [C]
    if needs.bias and bias is not None:
        dbias = dz.sum(others).to(bias.dtype)  # [C]
    return dx, dweight, dbias
