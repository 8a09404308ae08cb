"""lowrank_residual on the CPU: csrc/lowrank_residual.cpp. The weight is packed once for each direction."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ... import _native
from ..._packed import may_pack, packed
from . import reference
from .op import Needs

LIBRARY = _native.library()


def reason(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
) -> str | None:
    return _native.reason(x, weight, bias, down, up)


def _pack(matrices: Tensor, rows_are_columns: bool) -> Tensor:
    """Each [rows, columns] matrix of a stack as an operand B: its transpose (rows_are_columns) or itself."""
    stack = matrices.contiguous().reshape(-1, *matrices.shape[-2:])
    columns, depth = stack.shape[1:] if rows_are_columns else stack.shape[:0:-1]
    size = LIBRARY.packed_bytes(_native.dtype_code(stack), columns, depth)
    out = torch.empty((stack.shape[0], size), dtype=torch.uint8)
    for source, to in zip(stack, out, strict=True):
        LIBRARY.pack_operand(
            _native.dtype_code(stack),
            _native.address(to),
            _native.address(source),
            columns,
            depth,
            rows_are_columns,
            _native.threads(),
        )
    return out


def packed_bytes(weight: Tensor) -> int:
    """Of a packed copy of a weight [O, C]: CPUs without instructions for bfloat16 multiply it as float32."""
    known = weight.dtype in _native.DTYPES
    return LIBRARY.packed_bytes(_native.dtype_code(weight), *weight.shape) if known else weight.nbytes


def _weight(weight: Tensor, direction: Literal["forward", "backward"], keep: bool) -> Tensor:
    """The frozen weight packed: the copy that is kept where one may be, else one for this call."""

    def pack(weight: Tensor) -> Tensor:
        return _pack(weight, rows_are_columns=direction == "forward")

    return packed(weight, f"lowrank {direction}", pack) if keep and may_pack(direction) else pack(weight.detach())


def _adapter(p: Tensor, dtype: torch.dtype, rows_are_columns: bool) -> Tensor:
    """down or up, packed anew whenever a training step has changed it."""
    return packed(p, ("adapter", dtype, rows_are_columns), lambda p: _pack(p.to(dtype), rows_are_columns))


def _project(
    x: Tensor,
    w: Tensor,
    outputs: int,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    rank: int,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(x W + bias + low up, low = mask scale (x down)) with packed w, down, up; low is [rows, rank padded]."""
    x = x.contiguous()
    samples = 1 if index is None else x.shape[0]
    rows = x.numel() // x.shape[-1]
    y = x.new_empty((*x.shape[:-1], outputs))
    low = x.new_empty((rows, LIBRARY.low_rank_width(_native.dtype_code(x), rank)))
    mask = None if mask is None else mask.to(torch.float32).contiguous()
    index = None if index is None else index.contiguous()
    LIBRARY.lowrank_residual(
        _native.dtype_code(x),
        tuple(map(_native.address, (x, w, bias, down, up, mask, index, low, y))),
        (samples, rows // samples, x.shape[-1], outputs, rank),
        scale,
        _native.threads(),
    )
    return y, low


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
    pack: bool = True,
) -> Tensor:
    w = _weight(weight, "forward", pack)
    a, b = (_adapter(p, x.dtype, rows_are_columns=True) for p in (down, up))
    bias = None if bias is None else bias.contiguous()
    return _project(x, w, weight.shape[0], bias, a, b, down.shape[-2], mask, scale, index)[0]


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
    needs: Needs,
    pack: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx is the same projection the other way round; its low-rank part t also gives ddown."""
    dx = t = None
    if needs.x:
        w = _weight(weight, "backward", pack)
        a, b = (_adapter(p, dy.dtype, rows_are_columns=False) for p in (up, down))
        dx, low = _project(dy, w, weight.shape[1], None, a, b, down.shape[-2], mask, scale, index)
        t = low[:, : down.shape[-2]]
    ddown_here = needs.down and t is not None and x is not None
    empty = dy.new_empty(0)
    others = Needs(False, needs.weight, needs.bias, needs.down and not ddown_here, needs.up, needs.mask)
    gradients = (empty,) * 6
    if any(others):
        gradients = reference.backward(dy, x, weight, down, up, mask, scale, index, others)
    _, dweight, dbias, ddown, dup, dmask = gradients
    if t is not None and x is not None and ddown_here:
        samples = 1 if index is None else x.shape[0]
        rows = x.reshape(samples, -1, x.shape[-1])
        ddown = reference.sum_by_concept(t.reshape(samples, -1, t.shape[-1]).transpose(1, 2) @ rows, index, down)
    return (empty if dx is None else dx), dweight, dbias, ddown, dup, dmask
