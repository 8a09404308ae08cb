"""A convolution whose weight trains: on the CPU, products over the unfolded input where the weight is the larger.

torch's convolution re-orders such a weight in the forward and twice more in the backward, which costs more than the
products do. Weights in channels-last memory are then never copied, and their gradients come in the same memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._dispatch import forced_backend


def trained_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> Tensor:
    """y = conv2d(x, weight) + bias for x [B, C_in, H, W] and a square weight [C_out, C_in, K, K], all of one dtype."""
    rows = x.shape[0] * (x.shape[2] // stride) * (x.shape[3] // stride)
    small = x.device.type == "cpu" and x.dtype == torch.bfloat16 and rows <= weight.shape[0]
    if small and forced_backend() != "reference":
        return _Unfolded.apply(x, weight, bias, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding)


class _Unfolded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.numbers = weight.shape[-1], stride, padding
        ctx.has_bias = bias is not None
        patches = unfolded(x, *ctx.numbers)
        y = F.linear(patches.flatten(3).flatten(0, 2), as_matrix(weight), bias)
        return y.view(*patches.shape[:3], -1).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        size = ctx.numbers[0]
        rows = dy.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            taps = (rows @ as_matrix(weight)).view(dy.shape[0], *dy.shape[2:], size, size, -1)
            dx = folded(taps, tuple(x.shape), *ctx.numbers[1:])
        if ctx.needs_input_grad[1]:
            patches = unfolded(x, *ctx.numbers).flatten(3).flatten(0, 2)
            dweight = (rows.T @ patches).view(-1, size, size, x.shape[1]).permute(0, 3, 1, 2)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = rows.sum(0, dtype=torch.float32).to(rows.dtype)
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
