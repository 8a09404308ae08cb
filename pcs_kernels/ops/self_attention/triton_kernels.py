"""The Triton kernels of self_attention: online softmax forward, two recomputing kernels backward.

B batch, H heads, N queries, M keys, D head width in the parts D0 and D1 (40 = 32 + 16). Strides come in units of ALIGN
elements. Scores are kept in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._math import LOG2E, add_product, load_parts, rows_dot, store_parts, zero_parts


@triton.jit
def _head_base(ptr, b, h, stride_b, stride_h, ALIGN: tl.constexpr):
    return ptr + (b * stride_b + h * stride_h) * ALIGN


@triton.jit
def _split_pid(tiles, heads):
    """(tile, sample, head, row of [B, H]) of this program; neighbours share their head's keys."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    return pid % tiles, row // heads, row % heads, row


@triton.jit(do_not_specialize=["queries", "keys", "heads", "tiles"])
def self_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    queries,
    keys,
    heads,
    tiles,
    log2_scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_km,
    stride_vb,
    stride_vh,
    stride_vm,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EVEN: tl.constexpr,
):
    tile, b, h, row = _split_pid(tiles, heads)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    q_base = _head_base(q_ptr, b, h, stride_qb, stride_qh, ALIGN)
    k_base = _head_base(k_ptr, b, h, stride_kb, stride_kh, ALIGN)
    v_base = _head_base(v_ptr, b, h, stride_vb, stride_vh, ALIGN)
    q0, q1 = load_parts(q_base, n, queries, stride_qn * ALIGN, D, D0, D1)
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    o0, o1 = zero_parts(BLOCK_N, D0, D1)
    for start in range(0, keys, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        k0, k1 = load_parts(k_base, m, keys, stride_km * ALIGN, D, D0, D1)
        s = rows_dot(q0, q1, k0, k1, D1) * log2_scale
        if not EVEN:
            s = tl.where((m < keys)[None, :], s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        peak = new_peak
        total = total * shrink + tl.sum(p, 1)
        o0 *= shrink[:, None]
        if D1 > 0:
            o1 *= shrink[:, None]
        v0, v1 = load_parts(v_base, m, keys, stride_vm * ALIGN, D, D0, D1)
        o0, o1 = add_product(p.to(v0.dtype), v0, v1, o0, o1, D1)
    o0 = o0 / total[:, None]
    if D1 > 0:
        o1 = o1 / total[:, None]
    store_parts(out_ptr + (b * queries * heads + h) * D, n, queries, heads * D, o0, o1, D, D0, D1)
    tl.store(lse_ptr + row * queries + n, (peak + tl.log2(total)) / LOG2E, mask=n < queries)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "tiles"])
def self_bwd_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    queries,
    keys,
    heads,
    tiles,
    scale,
    log2_scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_km,
    stride_vb,
    stride_vh,
    stride_vm,
    stride_db,
    stride_dh,
    stride_dn,
    stride_ob,
    stride_oh,
    stride_on,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EVEN: tl.constexpr,
):
    """dq of one query tile, and delta = rowsum(dout out) for the other kernel."""
    tile, b, h, row = _split_pid(tiles, heads)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    q_base = _head_base(q_ptr, b, h, stride_qb, stride_qh, ALIGN)
    k_base = _head_base(k_ptr, b, h, stride_kb, stride_kh, ALIGN)
    v_base = _head_base(v_ptr, b, h, stride_vb, stride_vh, ALIGN)
    q0, q1 = load_parts(q_base, n, queries, stride_qn * ALIGN, D, D0, D1)
    do_base = _head_base(dout_ptr, b, h, stride_db, stride_dh, ALIGN)
    do0, do1 = load_parts(do_base, n, queries, stride_dn * ALIGN, D, D0, D1)
    o_base = _head_base(out_ptr, b, h, stride_ob, stride_oh, ALIGN)
    o0, o1 = load_parts(o_base, n, queries, stride_on * ALIGN, D, D0, D1)
    delta = tl.sum(do0.to(tl.float32) * o0.to(tl.float32), 1)
    if D1 > 0:
        delta += tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)
    tl.store(delta_ptr + row * queries + n, delta, mask=n < queries)
    lse = tl.load(lse_ptr + row * queries + n, mask=n < queries, other=float("inf")) * LOG2E
    dq0, dq1 = zero_parts(BLOCK_N, D0, D1)
    for start in range(0, keys, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        k0, k1 = load_parts(k_base, m, keys, stride_km * ALIGN, D, D0, D1)
        v0, v1 = load_parts(v_base, m, keys, stride_vm * ALIGN, D, D0, D1)
        p = tl.exp2(rows_dot(q0, q1, k0, k1, D1) * log2_scale - lse[:, None])
        if not EVEN:
            p = tl.where((m < keys)[None, :], p, 0.0)
        ds = p * (rows_dot(do0, do1, v0, v1, D1) - delta[:, None])
        dq0, dq1 = add_product(ds.to(k0.dtype), k0, k1, dq0, dq1, D1)
    dq0 *= scale
    if D1 > 0:
        dq1 *= scale
    store_parts(dq_ptr + (b * queries * heads + h) * D, n, queries, heads * D, dq0, dq1, D, D0, D1)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "tiles"])
def self_bwd_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    queries,
    keys,
    heads,
    tiles,
    scale,
    log2_scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_km,
    stride_vb,
    stride_vh,
    stride_vm,
    stride_db,
    stride_dh,
    stride_dn,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dk and dv of one key tile; P is transposed, so that it is a left operand without a shuffle."""
    tile, b, h, row = _split_pid(tiles, heads)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_base = _head_base(q_ptr, b, h, stride_qb, stride_qh, ALIGN)
    do_base = _head_base(dout_ptr, b, h, stride_db, stride_dh, ALIGN)
    k0, k1 = load_parts(_head_base(k_ptr, b, h, stride_kb, stride_kh, ALIGN), m, keys, stride_km * ALIGN, D, D0, D1)
    v0, v1 = load_parts(_head_base(v_ptr, b, h, stride_vb, stride_vh, ALIGN), m, keys, stride_vm * ALIGN, D, D0, D1)
    dk0, dk1 = zero_parts(BLOCK_M, D0, D1)
    dv0, dv1 = zero_parts(BLOCK_M, D0, D1)
    for start in range(0, queries, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        q0, q1 = load_parts(q_base, n, queries, stride_qn * ALIGN, D, D0, D1)
        do0, do1 = load_parts(do_base, n, queries, stride_dn * ALIGN, D, D0, D1)
        lse = tl.load(lse_ptr + row * queries + n, mask=n < queries, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + row * queries + n, mask=n < queries, other=0.0)
        p = tl.exp2(rows_dot(k0, k1, q0, q1, D1) * log2_scale - lse[None, :])
        dv0, dv1 = add_product(p.to(do0.dtype), do0, do1, dv0, dv1, D1)
        ds = p * (rows_dot(v0, v1, do0, do1, D1) - delta[None, :])
        dk0, dk1 = add_product(ds.to(q0.dtype), q0, q1, dk0, dk1, D1)
    dk0 *= scale
    if D1 > 0:
        dk1 *= scale
    at = (b * keys * heads + h) * D
    store_parts(dk_ptr + at, m, keys, heads * D, dk0, dk1, D, D0, D1)
    store_parts(dv_ptr + at, m, keys, heads * D, dv0, dv1, D, D0, D1)
