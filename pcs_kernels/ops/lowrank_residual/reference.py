"""A frozen projection with a masked low-rank residual, in pure torch.

B samples of M rows, R rank, K concepts in a stack.

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
        return x.reshape(1, -1, x.shape[-1]), down[None], up[None]  # [1, M, C], [1, R, C_in], [1, C_out, R]
    return x.reshape(x.shape[0], -1, x.shape[-1]), down[index], up[index]  # [B, M, C], [B, R, C_in], [B, C_out, R]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
    pack: bool = True,
) -> Tensor:
    rows, a, b = per_sample(x, down, up, index)
    residual = (rows @ a.transpose(1, 2)) @ b.transpose(1, 2) * scale  # [B, M, C_out]
    if mask is not None:
        residual = residual * mask.reshape(rows.shape[0], -1, 1).to(x.dtype)  # [B, M, C_out]
    y = torch.nn.functional.linear(x, weight, bias)  # [..., C_out]
    return y + residual.reshape(y.shape)  # [..., C_out]


def sum_by_concept(gradient: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """The gradients [B, ...] of each sample's adapter added into the stack [K, ...]."""
    if index is None:
        return gradient[0].to(like.dtype)
    chosen = torch.nn.functional.one_hot(index, like.shape[0]).to(gradient.dtype)  # [B, K]
    return (chosen.transpose(0, 1) @ gradient.flatten(1)).reshape(like.shape).to(like.dtype)  # [K, ...]


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
    pack: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """t = scale mask dy up;  dx = dy W + t down;  ddown = t^T x;  dup = scale (mask dy)^T (x down^T)"""
    empty = dy.new_empty(0)
    flat = dy.reshape(-1, dy.shape[-1])  # [B M, C_out]
    rows_dy, a, b = per_sample(dy, down, up, index)  # [B, M, C_out], [B, R, C_in], [B, C_out, R]
    weighted = rows_dy * scale  # [B, M, C_out]
    if mask is not None:
        weighted = weighted * mask.reshape(rows_dy.shape[0], -1, 1).to(dy.dtype)  # [B, M, C_out]
    t = weighted @ b  # [B, M, R]
    dx = dweight = dbias = ddown = dup = dmask = empty
    if needs.x:
        dx = (dy @ weight) + (t @ a).reshape(*dy.shape[:-1], -1)  # [..., C_in]
    if needs.bias:
        dbias = flat.sum(0)  # [C_out]
    if x is not None:
        rows_x = x.reshape(rows_dy.shape[0], -1, x.shape[-1])  # [B, M, C_in]
        s = rows_x @ a.transpose(1, 2)  # [B, M, R]
        if needs.weight:
            dweight = flat.transpose(0, 1) @ x.reshape(-1, x.shape[-1])  # [C_out, C_in]
        if needs.down:
            ddown = sum_by_concept(t.transpose(1, 2) @ rows_x, index, down)  # [(K,) R, C_in]
        if needs.up:
            dup = sum_by_concept(weighted.transpose(1, 2) @ s, index, up)  # [(K,) C_out, R]
        if needs.mask and mask is not None:
            slope = ((rows_dy * scale) * (s @ b.transpose(1, 2))).sum(-1)  # [B, M]
            dmask = slope.reshape(mask.shape).to(mask.dtype)  # x.shape[:-1]
    return dx, dweight, dbias, ddown, dup, dmask
