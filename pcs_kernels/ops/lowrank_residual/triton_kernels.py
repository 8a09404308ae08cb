"""The Triton kernels of lowrank_residual.

B samples (1 without index), L rows of a sample, K input and N output features, R rank. One product kernel serves the
forward (x, W, down, up) and the input's gradient (dy, W^T, up^T, down^T): only the strides differ.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _adapter(ptr, index_ptr, b, stride_concept, HAS_INDEX: tl.constexpr):
    """The adapter of sample b: the only one, or its own of the stack."""
    if HAS_INDEX:
        ptr += tl.load(index_ptr + b).to(tl.int64) * stride_concept
    return ptr


@triton.jit
def _load_tile(base, rows, cols, stride_row, stride_col, n_rows, n_cols):
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    return tl.load(base + rows[:, None].to(tl.int64) * stride_row + cols[None, :] * stride_col, mask=mask, other=0.0)


@triton.jit
def _row_weight(mask_ptr, b, rows, n_rows, scale, HAS_MASK: tl.constexpr):
    """mask scale of each row."""
    weight = tl.full(rows.shape, 1.0, tl.float32)
    if HAS_MASK:
        weight = tl.load(mask_ptr + b * n_rows + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
    return weight * scale


@triton.jit
def _add_residual(s, b_base, n, r, stride_bn, stride_br, outs, rank, y, DTYPE: tl.constexpr):
    """y + s b^T over the ranks r."""
    b = _load_tile(b_base, n, r, stride_bn, stride_br, outs, rank).to(DTYPE)
    return tl.dot(s.to(DTYPE), tl.trans(b), y, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "rank", "tiles_n"])
def lowrank_product_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    a_ptr,
    b_ptr,
    mask_ptr,
    index_ptr,
    s_ptr,
    y_ptr,
    rows,
    outs,
    ins,
    rank,
    tiles_n,
    scale,
    stride_xb,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ac,
    stride_ar,
    stride_ak,
    stride_bc,
    stride_bn,
    stride_br,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    READ_S: tl.constexpr,
    SAVE_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y = x w^T + bias + (mask scale) (s b^T), s = x a^T summed in the same loop, or read in steps of BLOCK_R."""
    pid = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    x_base = x_ptr + sample * stride_xb
    a_base = _adapter(a_ptr, index_ptr, sample, stride_ac, HAS_INDEX)
    b_base = _adapter(b_ptr, index_ptr, sample, stride_bc, HAS_INDEX)
    s_base = s_ptr + sample * rows * rank
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, ins, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _load_tile(x_base, m, k, stride_xm, stride_xk, rows, ins)
        w = _load_tile(w_ptr, n, k, stride_wn, stride_wk, outs, ins)
        y = tl.dot(x, tl.trans(w), y, input_precision="ieee")
        if not READ_S:
            a = _load_tile(a_base, r, k, stride_ar, stride_ak, rank, ins).to(x.dtype)
            s = tl.dot(x, tl.trans(a), s, input_precision="ieee")
    weight = _row_weight(mask_ptr, sample, m, rows, scale, HAS_MASK)
    if READ_S:
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            s = _load_tile(s_base, m, r, rank, 1, rows, rank) * weight[:, None]
            y = _add_residual(s, b_base, n, r, stride_bn, stride_br, outs, rank, y, x_ptr.dtype.element_ty)
    else:
        if SAVE_S:  # noqa: SIM102 - a constant and a tensor do not combine with `and`
            if pid % tiles_n == 0:
                at = s_base + m[:, None].to(tl.int64) * rank + r[None, :]
                tl.store(at, s, mask=(m < rows)[:, None] & (r < rank)[None, :])
        s = s * weight[:, None]
        y = _add_residual(s, b_base, n, r, stride_bn, stride_br, outs, rank, y, x_ptr.dtype.element_ty)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < outs, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + (sample * rows + m[:, None]) * outs + n[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < outs)[None, :])


@triton.jit(do_not_specialize=["rows", "rank"])
def lowrank_project_kernel(
    x_ptr,
    a_ptr,
    index_ptr,
    s_ptr,
    rows,
    ins,
    rank,
    stride_xb,
    stride_xm,
    stride_xk,
    stride_ac,
    stride_ar,
    stride_ak,
    HAS_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """s = x a^T in float32, [B, L, R]."""
    sample = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    x_base = x_ptr + sample * stride_xb
    a_base = _adapter(a_ptr, index_ptr, sample, stride_ac, HAS_INDEX)
    s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, ins, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _load_tile(x_base, m, k, stride_xm, stride_xk, rows, ins)
        a = _load_tile(a_base, r, k, stride_ar, stride_ak, rank, ins).to(x.dtype)
        s = tl.dot(x, tl.trans(a), s, input_precision="ieee")
    at = s_ptr + (sample * rows + m[:, None]) * rank + r[None, :]
    tl.store(at, s, mask=(m < rows)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["rows", "rank", "splits", "per_split"])
def lowrank_grad_kernel(
    x_ptr,
    s_ptr,
    mask_ptr,
    part_ptr,
    rows,
    features,
    rank,
    splits,
    per_split,
    scale,
    stride_xb,
    stride_xm,
    stride_xk,
    stride_pc,
    stride_pr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One split of a sample's rows: sum of x^T (mask scale s), [features, rank] in any orientation, in its own slot."""
    slot = tl.program_id(1).to(tl.int64)
    sample, split = slot // splits, (slot % splits).to(tl.int32)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    x_base = x_ptr + sample * stride_xb
    s_base = s_ptr + sample * rows * rank
    total = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    first = split * per_split
    for start in range(first, tl.minimum(first + per_split, rows), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        x = _load_tile(x_base, m, c, stride_xm, stride_xk, rows, features)
        s = _load_tile(s_base, m, r, rank, 1, rows, rank)
        weight = _row_weight(mask_ptr, sample, m, rows, scale, HAS_MASK)
        total = tl.dot(tl.trans(x), (s * weight[:, None]).to(x.dtype), total, input_precision="ieee")
    at = part_ptr + slot * features * rank + c[:, None] * stride_pc + r[None, :] * stride_pr
    tl.store(at, total, mask=(c < features)[:, None] & (r < rank)[None, :])
