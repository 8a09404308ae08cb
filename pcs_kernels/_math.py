"""Device functions that several Triton kernels share; all of them also run in the interpreter.

No libdevice calls: the interpreter has none.
"""

from __future__ import annotations

import triton
import triton.language as tl

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


@triton.jit(do_not_specialize=["count", "per_owner"])
def sum_partials_kernel(
    part_ptr,
    owner_ptr,
    out_ptr,
    n,
    count,
    per_owner,
    HAS_OWNER: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[j, i] = sum of part[s, i] over s; with owners, over the s whose owner[s // per_owner] is j.

    Every BLOCK_S-th slot is added one after another, then the BLOCK_S sums by a tree: the same order in every run.
    """
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1)
    total = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mine = s < count
        if HAS_OWNER:
            mine = mine & (tl.load(owner_ptr + s // per_owner, mask=mine, other=-1) == j)
        at = part_ptr + s[:, None].to(tl.int64) * n + i[None, :]
        total += tl.load(at, mask=mine[:, None] & (i < n)[None, :], other=0.0)
    out = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + j.to(tl.int64) * n + i, out, mask=i < n)


# A head width D is covered by two power-of-two parts, D0 and D1 (40 = 32 + 16, 80 = 64 + 16), D1 = 0 where one will do.


@triton.jit
def load_parts(base, rows, n_rows, stride, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The rows' [R, D0] and [R, D1] parts, 0 outside; the second repeats the first where D1 is 0.

    Offsets inside one head are 32 bits, which halves the registers they take: `head_reason` says when they do not fit.
    """
    at = base + rows[:, None] * stride
    inside = (rows < n_rows)[:, None]
    d = tl.arange(0, D0)[None, :]
    if D0 > D:
        first = tl.load(at + d, mask=inside & (d < D), other=0.0)
    else:
        first = tl.load(at + d, mask=inside, other=0.0)
    second = first
    if D1 > 0:
        e = D0 + tl.arange(0, D1)[None, :]
        if D0 + D1 > D:
            second = tl.load(at + e, mask=inside & (e < D), other=0.0)
        else:
            second = tl.load(at + e, mask=inside, other=0.0)
    return first, second


@triton.jit
def store_parts(base, rows, n_rows, stride, first, second, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    at = base + rows[:, None] * stride
    inside = (rows < n_rows)[:, None]
    d = tl.arange(0, D0)[None, :]
    tl.store(at + d, first.to(base.dtype.element_ty), mask=inside & (d < D))
    if D1 > 0:
        e = D0 + tl.arange(0, D1)[None, :]
        tl.store(at + e, second.to(base.dtype.element_ty), mask=inside & (e < D))


@triton.jit
def rows_dot(a0, a1, b0, b1, D1: tl.constexpr):
    """a b^T over both parts of the width."""
    product = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if D1 > 0:
        product = tl.dot(a1, tl.trans(b1), product, input_precision="ieee")
    return product


@triton.jit
def add_product(a, b0, b1, sum0, sum1, D1: tl.constexpr):
    """sum + a b for both parts of b's width."""
    sum0 = tl.dot(a, b0, sum0, input_precision="ieee")
    if D1 > 0:
        sum1 = tl.dot(a, b1, sum1, input_precision="ieee")
    return sum0, sum1


@triton.jit
def zero_parts(R: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    first = tl.zeros([R, D0], tl.float32)
    second = first
    if D1 > 0:
        second = tl.zeros([R, D1], tl.float32)
    return first, second
