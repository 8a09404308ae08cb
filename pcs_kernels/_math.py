"""Device functions that several Triton kernels share; all of them also run in the interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import blocks, launch

LOG2E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def silu_slope(x):
    """d silu / dx = s + x s (1 - s)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def normal_pdf(x):
    return tl.exp2(x * x * (-0.5 * LOG2E)) * INV_SQRT_2PI


@triton.jit
def load_rows(base, rows, cols, stride, n_rows, n_cols):
    """A [rows, cols] tile with unit column stride; 0 outside n_rows x n_cols."""
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    return tl.load(base + rows[:, None].to(tl.int64) * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, value, rows, cols, stride, n_rows, n_cols):
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    at = base + rows[:, None].to(tl.int64) * stride + cols[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def sum_partials_kernel(
    part_ptr, owner_ptr, out_ptr, n, count, per_owner, HAS_OWNER: tl.constexpr, BLOCK: tl.constexpr
):
    """out[j, i] = sum of part[s, i] over s (with owners: over the s whose owner[s // per_owner] is j), in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1)
    inside = i < n
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(count):
        mine = inside
        if HAS_OWNER:
            mine = inside & (tl.load(owner_ptr + s // per_owner) == j)
        total += tl.load(part_ptr + s * n.to(tl.int64) + i, mask=mine, other=0.0)
    tl.store(out_ptr + j * n.to(tl.int64) + i, total.to(out_ptr.dtype.element_ty), mask=inside)


def sum_partials(part: Tensor, out: Tensor, owner: Tensor | None = None) -> Tensor:
    """part [S, n...] fp32 summed over S into contiguous out, always in the same order.

    With owner [B] int64, S = B * per_owner partials belong to B samples and out [K, n...] sums those of each owner.
    """
    count = part.shape[0]
    owners = 1 if owner is None else out.shape[0]
    n = part.numel() // count
    block = 256
    grid = (blocks(n, block), owners)
    per_owner = 1 if owner is None else count // owner.shape[0]
    launch(
        sum_partials_kernel,
        grid,
        part,
        part if owner is None else owner,
        out,
        n,
        count,
        per_owner,
        HAS_OWNER=owner is not None,
        BLOCK=block,
        num_warps=4,
        num_stages=1,
    )
    return out


def empty_like_heads_last(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[B, H, N, D] whose memory is [B, N, H, D], so that .transpose(1, 2).reshape(B, N, H * D) is a view."""
    batch, heads, rows, width = x.shape
    return x.new_empty((batch, rows, heads, width), dtype=dtype or x.dtype).transpose(1, 2)
