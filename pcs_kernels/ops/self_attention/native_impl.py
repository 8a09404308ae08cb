"""self_attention on the CPU: csrc/self_attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..._layout import attention_sizes, heads_last_empty, unit_rows

LIBRARY = _native.library()


def reason(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    return _native.reason(q, k, v)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = map(unit_rows, (q, k, v))
    out = heads_last_empty(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    LIBRARY.self_attention_forward(
        _native.dtype_code(q),
        *map(_native.heads, (q, k, v, out)),
        _native.address(lse),
        attention_sizes(q, k),
        scale,
        _native.threads(),
    )
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = map(unit_rows, (dout, q, k, v))
    dq, dk, dv = map(heads_last_empty, (q, k, v))
    LIBRARY.self_attention_backward(
        _native.dtype_code(q),
        *map(_native.heads, (dout, q, k, v, out)),
        _native.address(lse.contiguous()),
        *map(_native.heads, (dq, dk, dv)),
        attention_sizes(q, k),
        scale,
        _native.threads(),
    )
    return dq, dk, dv
