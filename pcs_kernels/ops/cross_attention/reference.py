"""Cross-attention that also returns its maps, in pure torch.

P = softmax(scale q k^T);  out = P v;  maps[b, g, n] = mean over heads of sum_t P[b, h, n, t] capture[b, g, t]
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dtypes import accumulator
from .op import Needs


def heads_last(x: Tensor) -> Tensor:
    """[B, H, N, D] with the memory of [B, N, H, D], so that merging the heads is a free view."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)  # [B, H, N, D]


def probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """P [B, H, N, T], in the accumulation dtype."""
    scores = q @ k.transpose(-1, -2)  # [B, H, N, T]
    return torch.softmax(scores.to(accumulator(q.dtype)) * scale, dim=-1)  # [B, H, N, T]


def forward(q: Tensor, k: Tensor, v: Tensor, capture: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    p = probabilities(q, k, scale)  # [B, H, N, T]
    out = heads_last(p.to(v.dtype) @ v)  # [B, H, N, D]
    if capture is None:
        return out, p.new_empty(q.shape[0], 0, q.shape[2])  # [B, 0, N]
    return out, capture.to(p.dtype) @ p.mean(dim=1).transpose(-1, -2)  # [B, G, N]


def backward(
    dout: Tensor | None,
    dmaps: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    capture: Tensor | None,
    scale: float,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """dP = dout v^T + dmaps^T capture / H;  dS = P (dP - rowsum(P dP));  dq = scale dS k;  dk = scale dS^T q"""
    p = probabilities(q, k, scale)  # [B, H, N, T]
    dp = torch.zeros_like(p)  # [B, H, N, T]
    if dout is not None:
        dp = dp + dout @ v.transpose(-1, -2)  # [B, H, N, T]
    if dmaps is not None and capture is not None:
        dp = dp + (dmaps.transpose(-1, -2) @ capture.to(dmaps.dtype))[:, None] / q.shape[1]  # + [B, 1, N, T]
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(q.dtype)  # [B, H, N, T]
    dq = heads_last(ds @ k) if needs.q else q.new_empty(0)  # [B, H, N, D]
    dk = heads_last(ds.transpose(-1, -2) @ q) if needs.k else q.new_empty(0)  # [B, H, T, D]
    dv = q.new_empty(0)
    if needs.v and dout is not None:
        dv = heads_last(p.to(v.dtype).transpose(-1, -2) @ dout)  # [B, H, T, D]
    elif needs.v:
        dv = heads_last(torch.zeros_like(v))  # [B, H, T, D]
    return dq, dk, dv
