"""The Triton kernel of cross_attention's forward: all text tokens are one row, so the softmax is a single pass.

B batch, H heads, N queries, T tokens, D head width, G captured groups. The T tokens are covered by two power-of-two
parts, T0 and T1 (77 = 64 + 16), as D is by D0 and D1; T1 = 0 or D1 = 0 where one will do. Strides come in units of
ALIGN elements. Nothing of size N x T leaves a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._math import add_product, load_parts, rows_dot, store_parts, zero_parts


@triton.jit
def _scores(q0, q1, k_base, t, tokens, stride_kt, log2_scale, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Scores in units of log 2, -inf outside the tokens."""
    k0, k1 = load_parts(k_base, t, tokens, stride_kt, D, D0, D1)
    return tl.where((t < tokens)[None, :], rows_dot(q0, q1, k0, k1, D1) * log2_scale, float("-inf"))


@triton.jit
def softmax_parts(
    q0,
    q1,
    k_base,
    tokens,
    stride_kt,
    log2_scale,
    T0: tl.constexpr,
    T1: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
):
    """P over both parts of the tokens, and log2 of each row's denominator."""
    s0 = _scores(q0, q1, k_base, tl.arange(0, T0), tokens, stride_kt, log2_scale, D, D0, D1)
    peak = tl.max(s0, 1)
    p1 = s0
    if T1 > 0:
        s1 = _scores(q0, q1, k_base, T0 + tl.arange(0, T1), tokens, stride_kt, log2_scale, D, D0, D1)
        peak = tl.maximum(peak, tl.max(s1, 1))
        p1 = tl.exp2(s1 - peak[:, None])
    p0 = tl.exp2(s0 - peak[:, None])
    total = tl.sum(p0, 1)
    if T1 > 0:
        total += tl.sum(p1, 1)
        p1 = p1 / total[:, None]
    return p0 / total[:, None], p1, peak + tl.log2(total)


@triton.jit
def _weighted_values(p, v_base, t, tokens, stride_vt, sum0, sum1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    v0, v1 = load_parts(v_base, t, tokens, stride_vt, D, D0, D1)
    return add_product(p.to(v0.dtype), v0, v1, sum0, sum1, D1)


@triton.jit
def _captured(p, capture_at, t, tokens):
    """sum_t P capture for one group."""
    weight = tl.load(capture_at + t, mask=t < tokens, other=0.0).to(tl.float32)
    return tl.sum(p * weight[None, :], 1)


@triton.jit(do_not_specialize=["queries", "tokens", "heads", "groups", "first_block", "tiles"])
def cross_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    capture_ptr,
    out_ptr,
    maps_ptr,
    queries,
    tokens,
    heads,
    groups,
    first_block,
    tiles,
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
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPTURE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WRITE_OUT: tl.constexpr,
):
    """Without CAPTURE a program is one (b, h, query tile); with it one (b, query tile) that loops over the heads.

    Axis 1 of the grid runs over blocks of BLOCK_G groups from first_block on.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    if CAPTURE:
        b, first_head, last_head = pid // tiles, 0, heads
    else:
        b, first_head = pid // tiles // heads, pid // tiles % heads
        last_head = first_head + 1
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first_group = (first_block + tl.program_id(1)) * BLOCK_G
    g = first_group + tl.arange(0, BLOCK_G)
    maps = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    batch = b.to(tl.int64) * ALIGN
    for h in range(first_head, last_head):
        q_base = q_ptr + batch * stride_qb + tl.cast(h, tl.int64) * (stride_qh * ALIGN)
        k_base = k_ptr + batch * stride_kb + tl.cast(h, tl.int64) * (stride_kh * ALIGN)
        v_base = v_ptr + batch * stride_vb + tl.cast(h, tl.int64) * (stride_vh * ALIGN)
        q0, q1 = load_parts(q_base, n, queries, stride_qn * ALIGN, D, D0, D1)
        p0, p1, _ = softmax_parts(q0, q1, k_base, tokens, stride_kt * ALIGN, log2_scale, T0, T1, D, D0, D1)
        if CAPTURE:
            for i in tl.static_range(BLOCK_G):
                # a repeated last group stands in for those past the end; it is not stored
                group = tl.minimum(first_group + i, groups - 1)
                capture_at = capture_ptr + (b.to(tl.int64) * groups + group) * tokens
                column = _captured(p0, capture_at, tl.arange(0, T0), tokens)
                if T1 > 0:
                    column += _captured(p1, capture_at, T0 + tl.arange(0, T1), tokens)
                maps += tl.where((g == first_group + i)[None, :], column[:, None], 0.0)
        if WRITE_OUT:
            o0, o1 = zero_parts(BLOCK_N, D0, D1)
            o0, o1 = _weighted_values(p0, v_base, tl.arange(0, T0), tokens, stride_vt * ALIGN, o0, o1, D, D0, D1)
            if T1 > 0:
                t = T0 + tl.arange(0, T1)
                o0, o1 = _weighted_values(p1, v_base, t, tokens, stride_vt * ALIGN, o0, o1, D, D0, D1)
            out_base = out_ptr + (b.to(tl.int64) * queries * heads + h) * D
            store_parts(out_base, n, queries, heads * D, o0, o1, D, D0, D1)
    if CAPTURE:
        at = maps_ptr + (b.to(tl.int64) * groups + g[None, :]) * queries + n[:, None]
        tl.store(at, maps / heads, mask=(n < queries)[:, None] & (g < groups)[None, :])
