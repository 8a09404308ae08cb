"""Convolution and linear product with a frozen weight, in pure torch; the backward gives the input's gradient only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input


def forward_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, pack: bool) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding)  # [B, O, H', W']


def backward_conv(dy: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: int, pack: bool) -> Tensor:
    if dy.device.type == "cpu":
        # measured: a channels-last dy with a plain weight of 1280 x 1280 x 3 x 3 takes a transposed one twice as long
        return conv2d_input((dy.shape[0], weight.shape[1], height, width), weight, dy, stride, padding)
    return transposed(dy, weight, height, width, stride, padding)  # [B, C, H, W]


def transposed(dy: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: int) -> Tensor:
    """The input's gradient as a transposed convolution: channels-last where dy or the weight is.

    torch's own gradient takes its layout from the input, and without one computes in NCHW whatever dy is.
    """
    # rows and columns that the last step of the kernel did not reach
    rest = tuple((n + 2 * padding - k) % stride for n, k in ((height, weight.shape[2]), (width, weight.shape[3])))
    return F.conv_transpose2d(dy, weight, None, stride, padding, rest)  # [B, C, H, W]


def forward_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pack: bool) -> Tensor:
    return F.linear(x, weight, bias)  # [..., O]


def backward_linear(dy: Tensor, weight: Tensor, pack: bool) -> Tensor:
    return dy @ weight  # [..., C]
