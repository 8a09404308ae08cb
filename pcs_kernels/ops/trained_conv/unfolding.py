"""A convolution as a product over its unfolded input, with all three gradients.

torch's convolution re-orders a weight in the forward and twice more in the backward, which costs more than the products
do where the weight is large. Weights in channels-last memory are not copied here: one as a matrix is a view.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Unfolded(torch.autograd.Function):
    """conv2d of x [B, C_in, H, W] with a square weight [C_out, C_in, K, K] and a bias or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.numbers = weight.shape[-1], stride, padding
        ctx.has_bias = bias is not None
        patches = unfolded(x, *ctx.numbers)  # [B, h, w, K, K, C_in]
        y = F.linear(patches.flatten(3).flatten(0, 2), as_matrix(weight), bias)  # [B h w, C_out]
        return y.view(*patches.shape[:3], -1).permute(0, 3, 1, 2)  # [B, C_out, h, w]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        size = ctx.numbers[0]
        rows = dy.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])  # [B h w, C_out]
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            taps = (rows @ as_matrix(weight)).view(dy.shape[0], *dy.shape[2:], size, size, -1)  # [B, h, w, K, K, C_in]
            dx = folded(taps, tuple(x.shape), *ctx.numbers[1:])  # [B, C_in, H, W]
        if ctx.needs_input_grad[1]:
            patches = unfolded(x, *ctx.numbers).flatten(3).flatten(0, 2)  # [B h w, K K C_in]
            dweight = (rows.T @ patches).view(-1, size, size, x.shape[1]).permute(0, 3, 1, 2)  # [C_out, C_in, K, K]
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = rows.sum(0, dtype=torch.float32).to(rows.dtype)  # [C_out]
        return dx, dweight, dbias, None, None


def as_matrix(weight: Tensor) -> Tensor:
    """[C_out, K K C_in]; a view of a channels-last weight."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def unfolded(x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """A view [B, h, w, K, K, C] of what each output position reads."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding)).contiguous()
    return padded.unfold(1, size, stride).unfold(2, size, stride).permute(0, 1, 2, 4, 5, 3)


def folded(taps: Tensor, shape: tuple[int, ...], stride: int, padding: int) -> Tensor:
    """The sum of taps [B, h, w, K, K, C] at the positions they were read from -> [B, C, H, W], added in float32."""
    batch, channels, height, width = shape
    h, w, size = taps.shape[1], taps.shape[2], taps.shape[3]
    padded = taps.new_zeros((batch, height + 2 * padding, width + 2 * padding, channels), dtype=torch.float32)
    for i in range(size):
        for j in range(size):
            padded[:, i : i + stride * h : stride, j : j + stride * w : stride] += taps[:, :, :, i, j]
    inside = padded[:, padding : padding + height, padding : padding + width]
    return inside.to(taps.dtype).permute(0, 3, 1, 2)
