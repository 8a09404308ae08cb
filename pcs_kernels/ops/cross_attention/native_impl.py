"""cross_attention on the CPU: csrc/cross_attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..._layout import attention_sizes, heads_last_empty, unit_rows
from .op import Needs

LIBRARY = _native.library()


def reason(q: Tensor, k: Tensor, v: Tensor, capture: Tensor | None, scale: float) -> str | None:
    return _native.reason(q, k, v)


def forward(q: Tensor, k: Tensor, v: Tensor, capture: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = map(unit_rows, (q, k, v))
    capture = None if capture is None else capture.contiguous()
    groups = 0 if capture is None else capture.shape[1]
    out = heads_last_empty(q)
    maps = q.new_empty((q.shape[0], groups, q.shape[2]), dtype=torch.float32)
    LIBRARY.cross_attention_forward(
        _native.dtype_code(q),
        *map(_native.heads, (q, k, v, out)),
        _native.address(capture),
        _native.address(maps),
        groups,
        attention_sizes(q, k),
        scale,
        _native.threads(),
    )
    return out, maps


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
    q, k, v = map(unit_rows, (q, k, v))
    dout = None if dout is None else unit_rows(dout)
    capture = None if capture is None else capture.contiguous()
    dmaps = None if dmaps is None else dmaps.to(torch.float32).contiguous()
    groups = 0 if capture is None or dmaps is None else capture.shape[1]
    gradients = [heads_last_empty(x) if needed else None for x, needed in zip((q, k, v), needs, strict=True)]
    LIBRARY.cross_attention_backward(
        _native.dtype_code(q),
        _native.heads(dout),
        _native.address(dmaps),
        *map(_native.heads, (q, k, v)),
        _native.address(capture),
        groups,
        *map(_native.heads, gradients),
        attention_sizes(q, k),
        scale,
        _native.threads(),
    )
    empty = q.new_empty(0)
    dq, dk, dv = (empty if g is None else g for g in gradients)
    return dq, dk, dv
