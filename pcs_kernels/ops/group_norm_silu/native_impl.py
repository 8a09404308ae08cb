"""group_norm_silu on the CPU: csrc/group_norm_silu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from .op import Needs

LIBRARY = _native.library()


def reason(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> str | None:
    return _native.reason(x, weight, bias)


def _channels_last(x: Tensor) -> bool:
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _in_layout(t: Tensor, x: Tensor) -> Tensor:
    """t with x's memory layout where x has one of the two, else contiguous."""
    if not _channels_last(x):
        return t.contiguous()
    return t if _channels_last(t) else t.movedim(1, -1).contiguous().movedim(-1, 1)


def _contiguous(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.contiguous()


def _shape(x: Tensor, groups: int) -> tuple[int, int, int, int, bool]:
    return (x.shape[0], x.shape[1], x.numel() // (x.shape[0] * x.shape[1]), groups, _channels_last(x))


def forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dense = _in_layout(x, x)
    y = torch.empty_like(dense)
    mean = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    weight, bias = _contiguous(weight), _contiguous(bias)
    LIBRARY.group_norm_silu_forward(
        _native.dtype_code(x),
        _native.address(dense),
        _native.address(y),
        _shape(dense, groups),
        _native.values(weight),
        _native.values(bias),
        _native.address(mean),
        _native.address(rstd),
        eps,
        silu,
        _native.threads(),
    )
    return y if dense is x else torch.empty_like(x).copy_(y), mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    dense = _in_layout(x, x)
    dy = _in_layout(dy, dense)
    dx = torch.empty_like(dense) if needs.x else None
    weight, bias = _contiguous(weight), _contiguous(bias)
    dweight = torch.empty_like(weight, dtype=torch.float32) if needs.weight and weight is not None else None
    dbias = torch.empty_like(bias, dtype=torch.float32) if needs.bias and bias is not None else None
    LIBRARY.group_norm_silu_backward(
        _native.dtype_code(x),
        _native.address(dy),
        _native.address(dense),
        _shape(dense, groups),
        _native.address(mean),
        _native.address(rstd),
        _native.values(weight),
        _native.values(bias),
        silu,
        _native.address(dx),
        _native.address(dweight),
        _native.address(dbias),
        _native.threads(),
    )
    empty = x.new_empty(0)
    if dx is not None and dense is not x:
        dx = torch.empty_like(x).copy_(dx)
    return (
        empty if dx is None else dx,
        empty if dweight is None or weight is None else dweight.to(weight.dtype),
        empty if dbias is None or bias is None else dbias.to(bias.dtype),
    )
