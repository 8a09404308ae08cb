"""Nearest-neighbor upsampling by two and the 3x3 convolution after it, as one convolution of the small image.

Each of the four output pixels that come from one input pixel sees only 2x2 input pixels: rows 2i and 2i+1 weigh them
(w0, w1 + w2) and (w0 + w1, w2). So four 2x2 kernels on the small image give the same numbers (to rounding of the summed
weights) for 16 multiplications instead of 36. Used for frozen weights on the CPU; the kernels are made once.

Letters: B batch, C input channels, O output channels, H x W the small image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pcs_kernels
from pcs_kernels.streaming import lent, parts_of

from .layers import Conv2d, held

# [phase, tap of the 2-tap kernel, tap of the 3-tap kernel]
TAPS = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


def phase_kernels(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] -> [4 O, C, 2, 2], the phases (row, column) outermost; summed in fp32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    taps = torch.tensor(TAPS, dtype=wide, device=weight.device)
    kernels = torch.einsum("api,bqj,ocij->abocpq", taps, taps, weight.to(wide))  # [2, 2, O, C, 2, 2]
    return kernels.flatten(0, 2).to(weight.dtype)


class _Interleave(torch.autograd.Function):
    """z [B, 4 O, H + 1, W + 1], one quarter a phase -> y [B, O, 2 H, 2 W]; both channels-last."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        batch, channels, height, width = z.shape
        y = z.new_empty((batch, 2 * height - 2, 2 * width - 2, channels // 4))  # [B, 2 H, 2 W, O]
        for source, target in _phases(z.permute(0, 2, 3, 1), y):
            target.copy_(source)
        return y.permute(0, 3, 1, 2)  # [B, O, 2 H, 2 W]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        batch, channels, height, width = dy.shape
        dz = dy.new_zeros((batch, height // 2 + 1, width // 2 + 1, 4 * channels))  # [B, H + 1, W + 1, 4 O]
        for source, target in _phases(dz, dy.permute(0, 2, 3, 1)):
            source.copy_(target)
        return dz.permute(0, 3, 1, 2)  # [B, 4 O, H + 1, W + 1]


def _phases(z: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Where each phase stands in z [B, H + 1, W + 1, 4 O] and in y [B, 2 H, 2 W, O]."""
    height, width, z = z.shape[1] - 1, z.shape[2] - 1, z.unflatten(-1, (2, 2, -1))
    return [(z[:, a : a + height, b : b + width, a, b], y[:, a::2, b::2]) for a in (0, 1) for b in (0, 1)]


class UpsampledConv:
    """A frozen 3x3 convolution's phase kernels, remade when its weight is replaced or written to."""

    def __init__(self) -> None:
        self.seen: tuple[int, int] | None = None
        self.kernels: Tensor | None = None

    def forget(self) -> None:
        """Drop the kernels."""
        self.seen, self.kernels = None, None

    def __call__(self, conv: Conv2d, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the convolution's output [B, O, 2 H, 2 W] for the upsampled x."""
        weight = conv.weight
        seen = pcs_kernels.weight_version(weight)
        if self.kernels is None or seen != self.seen:
            whole = held(conv)
            whole = whole if isinstance(whole, Tensor) else lent(parts_of(whole), x.dtype)
            self.seen, self.kernels = seen, phase_kernels(whole.detach())
        bias = None if conv.bias is None else conv.bias.repeat(4)
        z = pcs_kernels.frozen_conv2d(x, self.kernels, bias, 1, 1)  # [B, 4 O, H + 1, W + 1]
        return _Interleave.apply(z)  # [B, O, 2 H, 2 W]
