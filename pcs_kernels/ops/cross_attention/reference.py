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
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    return torch.softmax(scores.to(accumulator(q.dtype)) * scale, dim=-1)


def forward(q: Tensor, k: Tensor, v: Tensor, capture: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    p = probabilities(q, k, scale)
    out = heads_last(p.to(v.dtype) @ v)
    if capture is None:
        return out, p.new_empty(q.shape[0], 0, q.shape[2])
    return out, capture.to(p.dtype) @ p.mean(dim=1).transpose(-1, -2)


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
    p = probabilities(q, k, scale)
    dp = torch.zeros_like(p)
    if dout is not None:
        dp = dp + dout @ v.transpose(-1, -2)
    if dmaps is not None and capture is not None:
        dp = dp + (dmaps.transpose(-1, -2) @ capture.to(dmaps.dtype))[:, None] / q.shape[1]
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(q.dtype)
    dq = heads_last(ds @ k) if needs.q else q.new_empty(0)
    dk = heads_last(ds.transpose(-1, -2) @ q) if needs.k else q.new_empty(0)
    dv = q.new_empty(0)
    if needs.v:
        dv = heads_last(p.to(v.dtype).transpose(-1, -2) @ dout) if dout is not None else heads_last(torch.zeros_like(v))
    return dq, dk, dv
