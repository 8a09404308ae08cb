"""The Triton kernels of lowrank_residual.

B samples (1 without index), L rows of a sample, K input and N output features, R rank, PAD the power of two >= R that
the tiles have. One product kernel serves the forward (x, W, down, up) and the input's gradient (dy, W^T, up^T, down^T):
FORWARD says which. Adapters are contiguous, and R is a constant of the compiler: what is known of a row's alignment
decides whether a thread moves 16 bytes or 4.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _adapter(ptr, index_ptr, b, features, HAS_INDEX: tl.constexpr, R: tl.constexpr):
    """The adapter of sample b: the only one, or its own of the stack."""
    if HAS_INDEX:
        ptr += tl.load(index_ptr + b).to(tl.int64) * (features * R)
    return ptr


@triton.jit
def _at(base, rows, cols, stride_row, stride_col):
    return base + rows[:, None].to(tl.int64) * stride_row + cols[None, :] * stride_col


@triton.jit
def _load(at, inside, along, left, EVEN: tl.constexpr):
    """A step of a loop: `left` of the summed dimension remain, all of them where EVEN."""
    if not EVEN:
        inside = inside & (along < left)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _operand_at(base, k, n, stride_k, stride_n, FORWARD: tl.constexpr):
    """Where an operand [k, n] is: rows of the tile are what lies one behind another in memory, k in the forward."""
    return _at(base, n, k, stride_n, stride_k) if FORWARD else _at(base, k, n, stride_k, stride_n)


@triton.jit
def _operand(at, k, n_inside, left, EVEN: tl.constexpr, FORWARD: tl.constexpr):
    if FORWARD:
        tile = tl.trans(_load(at, n_inside[:, None], k[None, :], left, EVEN))
    else:
        tile = _load(at, n_inside[None, :], k[:, None], left, EVEN)
    return tile


@triton.jit
def _first_half_at(base, k, r, features, FORWARD: tl.constexpr, R: tl.constexpr):
    """Where [k, r] is: of down^T in the forward, of up in the backward."""
    return _operand_at(base, k, r, 1, features, FORWARD) if FORWARD else _operand_at(base, k, r, R, 1, FORWARD)


@triton.jit
def _second_half(base, r, f, features, DTYPE: tl.constexpr, FORWARD: tl.constexpr, R: tl.constexpr):
    """[r, f]: up^T in the forward, down in the backward."""
    if FORWARD:
        mask = (f < features)[:, None] & (r < R)[None, :]
        tile = tl.trans(tl.load(_at(base, f, r, R, 1), mask=mask, other=0.0).to(DTYPE))
    else:
        mask = (r < R)[:, None] & (f < features)[None, :]
        tile = tl.load(_at(base, r, f, features, 1), mask=mask, other=0.0).to(DTYPE)
    return tile


@triton.jit
def _weighted(s, mask_ptr, b, rows, n_rows, scale, DTYPE: tl.constexpr, HAS_MASK: tl.constexpr):
    """mask scale s, rounded to DTYPE."""
    if HAS_MASK:
        s *= tl.load(mask_ptr + b * n_rows + rows, mask=rows < n_rows, other=0.0).to(tl.float32)[:, None]
    return (s * scale).to(DTYPE)


@triton.jit(do_not_specialize=["rows", "tiles_n"])
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
    tiles_n,
    scale,
    stride_xb,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    FORWARD: tl.constexpr,
    READ_S: tl.constexpr,
    SAVE_S: tl.constexpr,
    EVEN: tl.constexpr,
    R: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y = x w^T + bias + s b, s = mask scale x a summed in the same loop, or read in steps of BLOCK_R."""
    pid = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    a_base = _adapter(a_ptr, index_ptr, sample, ins, HAS_INDEX, R)
    b_base = _adapter(b_ptr, index_ptr, sample, outs, HAS_INDEX, R)
    x_at = _at(x_ptr + sample * stride_xb, m, k, stride_xm, stride_xk)
    w_at = _operand_at(w_ptr, k, n, stride_wk, stride_wn, FORWARD)
    a_at = _first_half_at(a_base, k, r, ins, FORWARD, R)
    s_at = _at(s_ptr + sample * rows * PAD, m, r, PAD, 1)
    inside = (m < rows)[:, None]
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, ins, BLOCK_K):
        left = ins - start
        x = _load(x_at, inside, k[None, :], left, EVEN)
        w = _operand(w_at, k, n < outs, left, EVEN, FORWARD)
        y = tl.dot(x, w, y, input_precision="ieee")
        if not READ_S:
            a = _operand(a_at, k, r < R, left, EVEN, FORWARD).to(x.dtype)
            s = tl.dot(x, a, s, input_precision="ieee")
            a_at += BLOCK_K * (1 if FORWARD else R)
        x_at += BLOCK_K * stride_xk
        w_at += BLOCK_K * stride_wk
    if READ_S:
        for start in range(0, R, BLOCK_R):
            b = _second_half(b_base, start + r, n, outs, x_ptr.dtype.element_ty, FORWARD, R)
            y = tl.dot(tl.load(s_at + start, mask=inside, other=0.0), b, y, input_precision="ieee")
    else:
        weighted = _weighted(s, mask_ptr, sample, m, rows, scale, x_ptr.dtype.element_ty, HAS_MASK)
        if SAVE_S:  # noqa: SIM102 - a constant and a tensor do not combine with `and`
            if pid % tiles_n == 0:
                tl.store(s_at, weighted, mask=inside)
        b = _second_half(b_base, r, n, outs, x_ptr.dtype.element_ty, FORWARD, R)
        y = tl.dot(weighted, b, y, input_precision="ieee")
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < outs, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + (sample * rows + m[:, None]) * outs + n[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside & (n < outs)[None, :])


@triton.jit(do_not_specialize=["rows"])
def lowrank_project_kernel(
    x_ptr,
    a_ptr,
    mask_ptr,
    index_ptr,
    s_ptr,
    rows,
    ins,
    per_split,
    scale,
    stride_xb,
    stride_xm,
    stride_xk,
    HAS_MASK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    FORWARD: tl.constexpr,
    EVEN: tl.constexpr,
    R: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """s = mask scale x a over one split of the features, [splits, B, L, PAD]: zero behind R."""
    sample = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, PAD)
    first = split * per_split
    last = tl.minimum(first + per_split, ins)
    k = first + tl.arange(0, BLOCK_K)
    x_at = _at(x_ptr + sample * stride_xb, m, k, stride_xm, stride_xk)
    a_base = _adapter(a_ptr, index_ptr, sample, ins, HAS_INDEX, R)
    a_at = _first_half_at(a_base, k, r, ins, FORWARD, R)
    inside = (m < rows)[:, None]
    s = tl.zeros([BLOCK_M, PAD], tl.float32)
    for start in range(first, last, BLOCK_K):
        left = ins - (start - first)
        x = _load(x_at, inside, k[None, :], left, EVEN)
        a = _operand(a_at, k, r < R, left, EVEN, FORWARD).to(x.dtype)
        s = tl.dot(x, a, s, input_precision="ieee")
        x_at += BLOCK_K * stride_xk
        a_at += BLOCK_K * (1 if FORWARD else R)
    weighted = _weighted(s, mask_ptr, sample, m, rows, scale, s_ptr.dtype.element_ty, HAS_MASK)
    at = s_ptr + ((split * tl.num_programs(1) + sample) * rows + m[:, None]) * PAD + r[None, :]
    tl.store(at, weighted, mask=inside)


@triton.jit(do_not_specialize=["rows", "splits", "per_split"])
def lowrank_grad_kernel(
    x_ptr,
    s_ptr,
    part_ptr,
    rows,
    features,
    splits,
    per_split,
    stride_xb,
    stride_xm,
    stride_xk,
    FORWARD: tl.constexpr,
    R: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One split of a sample's rows, in its own slot: s^T x [R, features] of down, with FORWARD; x^T s of up without."""
    slot = tl.program_id(1).to(tl.int64)
    sample, split = slot // splits, (slot % splits).to(tl.int32)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, PAD)
    part = part_ptr + slot * features * R
    first = split * per_split
    last = tl.minimum(first + per_split, rows)
    m = first + tl.arange(0, BLOCK_M)
    x_at = _at(x_ptr + sample * stride_xb, m, c, stride_xm, stride_xk)
    s_at = _at(s_ptr + sample * rows * PAD, m, r, PAD, 1)
    inside = (c < features)[None, :]
    if FORWARD:
        total = tl.zeros([PAD, BLOCK_C], tl.float32)
    else:
        total = tl.zeros([BLOCK_C, PAD], tl.float32)
    for start in range(first, last, BLOCK_M):
        here = (m < last - (start - first))[:, None]
        x = tl.load(x_at, mask=here & inside, other=0.0)
        s = tl.load(s_at, mask=here, other=0.0)
        if FORWARD:
            total = tl.dot(tl.trans(s), x, total, input_precision="ieee")
        else:
            total = tl.dot(tl.trans(x), s, total, input_precision="ieee")
        x_at += BLOCK_M * stride_xm
        s_at += BLOCK_M * PAD
    if FORWARD:
        tl.store(_at(part, r, c, features, 1), total, mask=(r < R)[:, None] & inside)
    else:
        tl.store(_at(part, c, r, R, 1), total, mask=(c < features)[:, None] & (r < R)[None, :])
