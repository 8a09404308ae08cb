"""A trained convolution on CPUs that do not multiply bfloat16: csrc/frozen_product.cpp and csrc/weight_gradient.cpp.

The three products read bfloat16 and sum in float32; the weight is not copied, and its gradient comes as it lies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..frozen_conv import native_product


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether these run here: bfloat16 alone is slow elsewhere."""
    return x.dtype == weight.dtype == torch.bfloat16 and not native_product.multiplies_bfloat16()


class Convolution(torch.autograd.Function):
    """conv2d of x [B, C_in, H, W] with a weight [C_out, C_in, K, K] and a bias or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.numbers, ctx.has_bias = (stride, padding), bias is not None
        return native_product.forward_conv(x, weight, bias, stride, padding)  # [B, C_out, h, w]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = native_product.backward_conv(dy, weight, x.shape[2], x.shape[3], *ctx.numbers)  # [B, C_in, H, W]
        if ctx.needs_input_grad[1]:
            dweight = native_product.weight_gradient(x, dy, weight, *ctx.numbers)  # [C_out, C_in, K, K]
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = dy.sum((0, 2, 3), dtype=torch.float32).to(dy.dtype)  # [C_out]
        return dx, dweight, dbias, None, None
