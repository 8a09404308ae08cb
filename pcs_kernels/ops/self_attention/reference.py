"""Self-attention in pure torch: out = softmax(scale q k^T) v, lse = log of the softmax's denominator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dtypes import accumulator
from ..cross_attention.reference import heads_last


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = (q @ k.transpose(-1, -2)).to(accumulator(q.dtype)) * scale
    lse = torch.logsumexp(scores, dim=-1)
    return heads_last(torch.softmax(scores, dim=-1).to(v.dtype) @ v), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """P = exp(S - lse);  dS = P (dout v^T - rowsum(dout out));  dq = scale dS k;  dk = scale dS^T q;  dv = P^T dout"""
    scores = (q @ k.transpose(-1, -2)).to(lse.dtype) * scale
    p = torch.exp(scores - lse[..., None])
    delta = (dout.to(lse.dtype) * out).sum(-1, keepdim=True)
    ds = (p * (dout @ v.transpose(-1, -2) - delta) * scale).to(q.dtype)
    dv = p.to(v.dtype).transpose(-1, -2) @ dout
    return heads_last(ds @ k), heads_last(ds.transpose(-1, -2) @ q), heads_last(dv)
