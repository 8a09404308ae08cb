"""Thin modules over the functions, with the parameter names of their torch counterparts: state_dicts carry over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops.frozen_conv import frozen_conv2d, frozen_linear
from .ops.geglu import geglu
from .ops.group_norm_silu import group_norm_silu
from .ops.lowrank_residual import lowrank_residual


class GroupNormSiLU(torch.nn.GroupNorm):
    """GroupNorm followed by SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)


class GEGLU(torch.nn.Linear):
    """The projection of a gated feed-forward and its gate: [..., C] -> [..., F]; `weight` is [2F, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return geglu(super().forward(x))


class FrozenLinear(torch.nn.Linear):
    """A Linear that never trains and keeps nothing for the backward."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


class FrozenConv2d(torch.nn.Conv2d):
    """A Conv2d that never trains and keeps nothing for the backward; square kernel, stride and padding."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        square = len(set(self.stride)) == len(set(self.padding)) == 1 and not isinstance(self.padding, str)
        if not square or self.groups != 1 or set(self.dilation) != {1} or self.padding_mode != "zeros":
            raise ValueError("FrozenConv2d takes one stride and one padding for both sides, no groups and no dilation")
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_conv2d(x, self.weight, self.bias, self.stride[0], int(self.padding[0]))


class LowrankResidual(torch.nn.Module):
    """A frozen projection (a Linear, or a 1x1 Conv2d's weight over the last dimension) with a trained residual.

    y = x W^T + b + mask scale (x down^T) up^T;  down ~ N(0, 1/rank), up = 0, so that it starts as the projection.
    """

    def __init__(self, projection: torch.nn.Linear | torch.nn.Conv2d, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}")
        self.projection = projection.requires_grad_(False)
        self.scale = scale
        c_out, c_in = projection.weight.shape[:2]
        self.down = torch.nn.Parameter(torch.randn(rank, c_in, device=projection.weight.device) * rank**-0.5)
        self.up = torch.nn.Parameter(torch.zeros(c_out, rank, device=projection.weight.device))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        weight, bias = self.projection.weight, self.projection.bias
        return lowrank_residual(x, weight, bias, self.down, self.up, mask, self.scale)
