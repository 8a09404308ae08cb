"""How attention's [B, H, N, D] tensors lie in memory, the same for every backend."""

from __future__ import annotations

from torch import Tensor


def heads_last_empty(x: Tensor) -> Tensor:
    """An empty tensor of x's shape [B, H, N, D] in the memory of [B, N, H, D]: merging its heads is a free view."""
    batch, heads, rows, width = x.shape
    return x.new_empty((batch, rows, heads, width)).transpose(1, 2)


def unit_rows(x: Tensor) -> Tensor:
    """x itself where its last dimension is dense, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
