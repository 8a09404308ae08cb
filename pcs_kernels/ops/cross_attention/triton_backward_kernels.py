"""The Triton kernels of cross_attention's backward: P is computed again, over query tiles and then over tokens.

Letters and layout as in `triton_kernels.py`; G captured groups. Every sum has a slot of its own: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._math import add_product, load_parts, rows_dot, store_parts, zero_parts
from .triton_kernels import softmax_parts


@triton.jit
def _grad_p(
    do0,
    do1,
    v_base,
    t,
    tokens,
    stride_vt,
    capture_at,
    dmaps_at,
    n,
    queries,
    heads,
    groups,
    HAS_DOUT: tl.constexpr,
    HAS_DMAPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
):
    """dP = dout v^T + sum_g dmaps[g] capture[g]^T / H"""
    if HAS_DOUT:
        v0, v1 = load_parts(v_base, t, tokens, stride_vt, D, D0, D1)
        dp = rows_dot(do0, do1, v0, v1, D1)
    else:
        dp = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    if HAS_DMAPS:
        for g in range(groups):
            weight = tl.load(capture_at + g * tokens + t, mask=t < tokens, other=0.0).to(tl.float32)
            slope = (
                tl.load(dmaps_at + tl.cast(g, tl.int64) * queries + n, mask=n < queries, other=0.0).to(tl.float32)
                / heads
            )
            dp += slope[:, None] * weight[None, :]
    return dp


@triton.jit(do_not_specialize=["queries", "tokens", "heads", "groups", "tiles"])
def cross_bwd_rows_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    capture_ptr,
    dmaps_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    queries,
    tokens,
    heads,
    groups,
    tiles,
    scale,
    log2_scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_ob,
    stride_oh,
    stride_on,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DOUT: tl.constexpr,
    HAS_DMAPS: tl.constexpr,
    NEED_Q: tl.constexpr,
    SAVE_ROWS: tl.constexpr,
):
    """One (b, h, query tile): dq, and for the token kernel each row's lse (base 2) and delta = rowsum(P dP)."""
    pid = tl.program_id(0)
    head = pid // tiles
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k_base = k_ptr + (b * stride_kb + h * stride_kh) * ALIGN
    v_base = v_ptr + (b * stride_vb + h * stride_vh) * ALIGN
    capture_at, dmaps_at = capture_ptr + b * groups * tokens, dmaps_ptr + b * groups * queries
    q0, q1 = load_parts(q_ptr + (b * stride_qb + h * stride_qh) * ALIGN, n, queries, stride_qn * ALIGN, D, D0, D1)
    do0, do1 = q0, q1
    if HAS_DOUT:
        do_base = dout_ptr + (b * stride_ob + h * stride_oh) * ALIGN
        do0, do1 = load_parts(do_base, n, queries, stride_on * ALIGN, D, D0, D1)
    p0, p1, lse = softmax_parts(q0, q1, k_base, tokens, stride_kt * ALIGN, log2_scale, T0, T1, D, D0, D1)
    t = tl.arange(0, T0)
    u = T0 + tl.arange(0, T1 if T1 > 0 else 16)
    dp0 = _grad_p(
        do0,
        do1,
        v_base,
        t,
        tokens,
        stride_vt * ALIGN,
        capture_at,
        dmaps_at,
        n,
        queries,
        heads,
        groups,
        HAS_DOUT,
        HAS_DMAPS,
        BLOCK_N,
        T0,
        D,
        D0,
        D1,
    )
    delta = tl.sum(p0 * dp0, 1)
    if T1 > 0:
        dp1 = _grad_p(
            do0,
            do1,
            v_base,
            u,
            tokens,
            stride_vt * ALIGN,
            capture_at,
            dmaps_at,
            n,
            queries,
            heads,
            groups,
            HAS_DOUT,
            HAS_DMAPS,
            BLOCK_N,
            T1,
            D,
            D0,
            D1,
        )
        delta += tl.sum(p1 * dp1, 1)
    if SAVE_ROWS:
        tl.store(lse_ptr + head.to(tl.int64) * queries + n, lse, mask=n < queries)
        tl.store(delta_ptr + head.to(tl.int64) * queries + n, delta, mask=n < queries)
    if NEED_Q:
        dq0, dq1 = zero_parts(BLOCK_N, D0, D1)
        k0, k1 = load_parts(k_base, t, tokens, stride_kt * ALIGN, D, D0, D1)
        ds = p0 * (dp0 - delta[:, None]) * scale
        dq0, dq1 = add_product(ds.to(k0.dtype), k0, k1, dq0, dq1, D1)
        if T1 > 0:
            k0, k1 = load_parts(k_base, u, tokens, stride_kt * ALIGN, D, D0, D1)
            ds = p1 * (dp1 - delta[:, None]) * scale
            dq0, dq1 = add_product(ds.to(k0.dtype), k0, k1, dq0, dq1, D1)
        store_parts(dq_ptr + (b * queries * heads + h) * D, n, queries, heads * D, dq0, dq1, D, D0, D1)


@triton.jit(do_not_specialize=["queries", "tokens", "heads", "groups", "batch", "splits", "per_split"])
def cross_bwd_tokens_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    capture_ptr,
    dmaps_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    queries,
    tokens,
    heads,
    batch,
    groups,
    splits,
    per_split,
    scale,
    log2_scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_ob,
    stride_oh,
    stride_on,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_DOUT: tl.constexpr,
    HAS_DMAPS: tl.constexpr,
    NEED_K: tl.constexpr,
    NEED_V: tl.constexpr,
):
    """One (b, h, split of the queries) for BLOCK_T tokens: its part of dk and dv in its own slot; P is transposed."""
    pid = tl.program_id(0)
    split, head = pid % splits, pid // splits
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    k_base = k_ptr + (b * stride_kb + h * stride_kh) * ALIGN
    v_base = v_ptr + (b * stride_vb + h * stride_vh) * ALIGN
    q_base = q_ptr + (b * stride_qb + h * stride_qh) * ALIGN
    do_base = dout_ptr + (b * stride_ob + h * stride_oh) * ALIGN
    capture_at, dmaps_at = capture_ptr + b * groups * tokens, dmaps_ptr + b * groups * queries
    k0, k1 = load_parts(k_base, t, tokens, stride_kt * ALIGN, D, D0, D1)
    v0, v1 = load_parts(v_base, t, tokens, stride_vt * ALIGN, D, D0, D1)
    dk0, dk1 = zero_parts(BLOCK_T, D0, D1)
    dv0, dv1 = zero_parts(BLOCK_T, D0, D1)
    first = split * per_split
    for start in range(first, tl.minimum(first + per_split, queries), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        q0, q1 = load_parts(q_base, n, queries, stride_qn * ALIGN, D, D0, D1)
        at = head.to(tl.int64) * queries + n
        lse = tl.load(lse_ptr + at, mask=n < queries, other=float("inf"))
        p = tl.exp2(rows_dot(k0, k1, q0, q1, D1) * log2_scale - lse[None, :])
        dp = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        if HAS_DOUT:
            do0, do1 = load_parts(do_base, n, queries, stride_on * ALIGN, D, D0, D1)
            if NEED_V:
                dv0, dv1 = add_product(p.to(q0.dtype), do0, do1, dv0, dv1, D1)
            dp = rows_dot(v0, v1, do0, do1, D1)
        if NEED_K:
            delta = tl.load(delta_ptr + at, mask=n < queries, other=0.0)
            if HAS_DMAPS:
                for g in range(groups):
                    weight = tl.load(capture_at + g * tokens + t, mask=t < tokens, other=0.0).to(tl.float32)
                    slope_at = dmaps_at + tl.cast(g, tl.int64) * queries + n
                    slope = tl.load(slope_at, mask=n < queries, other=0.0).to(tl.float32) / heads
                    dp += weight[:, None] * slope[None, :]
            ds = p * (dp - delta[None, :]) * scale
            dk0, dk1 = add_product(ds.to(q0.dtype), q0, q1, dk0, dk1, D1)
    slot = ((split * batch + b) * tokens * heads + h) * D
    if NEED_K:
        store_parts(dk_ptr + slot, t, tokens, heads * D, dk0, dk1, D, D0, D1)
    if NEED_V:
        store_parts(dv_ptr + slot, t, tokens, heads * D, dv0, dv1, D, D0, D1)
