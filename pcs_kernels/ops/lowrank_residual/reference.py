"""A frozen projection with a masked low-rank residual, in pure torch.

y = x W^T + b + mask scale (x down^T) up^T, with one adapter for all or one of K per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Needs


def per_sample(x: Tensor, down: Tensor, up: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x as [B, M, C] (B = 1 without index) and each sample's own down [B, R, C_in] and up [B, C_out, R]."""
    down, up = down.to(x.dtype), up.to(x.dtype)
    if index is None:
        return x.reshape(1, -1, x.shape[-1]), down[None], up[None]
    return x.reshape(x.shape[0], -1, x.shape[-1]), down[index], up[index]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
) -> Tensor:
    rows, a, b = per_sample(x, down, up, index)
    residual = (rows @ a.transpose(1, 2)) @ b.transpose(1, 2) * scale
    if mask is not None:
        residual = residual * mask.reshape(rows.shape[0], -1, 1).to(x.dtype)
    y = torch.nn.functional.linear(x, weight, bias)
    return y + residual.reshape(y.shape)


def sum_by_concept(gradient: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """The gradients [B, ...] of each sample's adapter added into the stack [K, ...]."""
    if index is None:
        return gradient[0].to(like.dtype)
    chosen = torch.nn.functional.one_hot(index, like.shape[0]).to(gradient.dtype)
    return (chosen.transpose(0, 1) @ gradient.flatten(1)).reshape(like.shape).to(like.dtype)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """t = scale mask dy up;  dx = dy W + t down;  ddown = t^T x;  dup = scale (mask dy)^T (x down^T)"""
    empty = dy.new_empty(0)
    flat = dy.reshape(-1, dy.shape[-1])
    rows_dy, a, b = per_sample(dy, down, up, index)
    weighted = rows_dy * scale
    if mask is not None:
        weighted = weighted * mask.reshape(rows_dy.shape[0], -1, 1).to(dy.dtype)
    t = weighted @ b
    dx = dweight = dbias = ddown = dup = dmask = empty
    if needs.x:
        dx = (dy @ weight) + (t @ a).reshape(*dy.shape[:-1], -1)
    if needs.bias:
        dbias = flat.sum(0)
    if x is not None:
        rows_x = x.reshape(rows_dy.shape[0], -1, x.shape[-1])
        s = rows_x @ a.transpose(1, 2)
        if needs.weight:
            dweight = flat.transpose(0, 1) @ x.reshape(-1, x.shape[-1])
        if needs.down:
            ddown = sum_by_concept(t.transpose(1, 2) @ rows_x, index, down)
        if needs.up:
            dup = sum_by_concept(weighted.transpose(1, 2) @ s, index, up)
        if needs.mask and mask is not None:
            dmask = ((rows_dy * scale) * (s @ b.transpose(1, 2))).sum(-1).reshape(mask.shape).to(mask.dtype)
    return dx, dweight, dbias, ddown, dup, dmask
