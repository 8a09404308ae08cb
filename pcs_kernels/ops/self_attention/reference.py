"""Self-attention in pure torch: out = softmax(scale q k^T) v, lse = log of the softmax's denominator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dtypes import accumulator
from ..cross_attention.reference import heads_last


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = (q @ k.transpose(-1, -2)).to(accumulator(q.dtype)) * scale  # [B, H, N, M]
    lse = torch.logsumexp(scores, dim=-1)  # [B, H, N]
    return heads_last(torch.softmax(scores, dim=-1).to(v.dtype) @ v), lse  # [B, H, N, D], [B, H, N]


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """P = exp(S - lse);  dS = P (dout v^T - rowsum(dout out));  dq = scale dS k;  dk = scale dS^T q;  dv = P^T dout"""
    scores = (q @ k.transpose(-1, -2)).to(lse.dtype) * scale  # [B, H, N, M]
    p = torch.exp(scores - lse[..., None])  # [B, H, N, M]
    delta = (dout.to(lse.dtype) * out).sum(-1, keepdim=True)  # [B, H, N, 1]
    ds = (p * (dout @ v.transpose(-1, -2) - delta) * scale).to(q.dtype)  # [B, H, N, M]
    dq = ds @ k  # [B, H, N, D]
    dk = ds.transpose(-1, -2) @ q  # [B, H, M, D]
    dv = p.to(v.dtype).transpose(-1, -2) @ dout  # [B, H, M, D]
    return heads_last(dq), heads_last(dk), heads_last(dv)
