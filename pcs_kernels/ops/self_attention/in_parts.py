"""The reference for some queries at a time: where a kernel that was chosen fails, all scores at once may not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

MOST_SCORES = 2**24  # of a part, 64 MB in float32; SD1.5 at 512 pixels has 2^27 an image


def _queries(q: Tensor, k: Tensor) -> int:
    """How many queries of all heads are taken at once."""
    return max(1, MOST_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    parts = [reference.forward(some, k, v, scale) for some in q.split(_queries(q, k), dim=2)]
    outs, lses = zip(*parts, strict=True)
    return _joined(list(outs)), torch.cat(lses, dim=2)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dk and dv are sums over the queries, made in the precision of lse."""
    dqs, dk, dv = [], torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
    cut = [t.split(_queries(q, k), dim=2) for t in (dout, q, out, lse)]
    for some_dout, some_q, some_out, some_lse in zip(*cut, strict=True):
        dq, more_dk, more_dv = reference.backward(some_dout, some_q, k, v, some_out, some_lse, scale)
        dqs.append(dq)
        dk += more_dk
        dv += more_dv
    return _joined(dqs), reference.heads_last(dk.to(k.dtype)), reference.heads_last(dv.to(v.dtype))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else reference.heads_last(torch.cat(parts, dim=2))
