"""Convolution and linear product with a frozen weight, in pure torch; the backward gives the input's gradient only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input


def forward_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, pack: bool) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding)  # [B, O, H', W']


def backward_conv(dy: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: int, pack: bool) -> Tensor:
    size = (dy.shape[0], weight.shape[1], height, width)
    return conv2d_input(size, weight, dy, stride, padding)  # [B, C, H, W]


def forward_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pack: bool) -> Tensor:
    return F.linear(x, weight, bias)  # [..., O]


def backward_linear(dy: Tensor, weight: Tensor, pack: bool) -> Tensor:
    return dy @ weight  # [..., C]
