"""GEGLU in pure torch: y = a gelu(b), [a | b] = x, gelu(b) = b Phi(b) with the exact error function."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)  # [..., F] each
    return a * torch.nn.functional.gelu(b)  # [..., F]


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """da = dy gelu(b);  db = dy a (Phi(b) + b phi(b))"""
    a, b = x.chunk(2, dim=-1)  # [..., F] each
    cdf = 0.5 * (1 + torch.erf(b / math.sqrt(2)))  # [..., F]
    density = torch.exp(-0.5 * b * b) / math.sqrt(2 * math.pi)  # [..., F]
    return torch.cat([dy * b * cdf, dy * a * (cdf + b * density)], dim=-1)  # [..., 2F]
