"""trained_conv2d: a convolution whose weight trains.

    y = conv2d(x, weight) + bias

x [B, C_in, H, W]; weight [C_out, C_in, K, K]; bias [C_out] -> y [B, C_out, H', W'].
On the CPU, where the weight is the larger operand, it is a product over the unfolded input (`unfolding.py`); everywhere
else, and under the reference backend, it is torch's own convolution, which is its own reference.
Kept for the backward: x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._dispatch import forced_backend
from .unfolding import Unfolded


def trained_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> Tensor:
    """A convolution with gradients for x, weight and bias, all of one dtype.

    Args:
        x: [B, C_in, H, W].
        weight: [C_out, C_in, K, K]; in channels-last memory it is never copied, and its gradient comes in the same.
        bias: [C_out] or None.
        stride: of both sides.
        padding: of both sides, with zeros.

    Returns:
        [B, C_out, H', W'].
    """
    positions = x.shape[0] * (x.shape[2] // stride) * (x.shape[3] // stride)
    # up to as many positions as output channels, the unfolded input [positions, K K C_in] is no larger than the weight
    small = x.device.type == "cpu" and x.dtype == torch.bfloat16 and positions <= weight.shape[0]
    if small and forced_backend() != "reference":
        return Unfolded.apply(x, weight, bias, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding)
