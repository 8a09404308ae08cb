"""The Triton kernels of adamw8bit: one pass over parameter, gradient and states; the 8-bit codes are a formula.

In decade i of seven the code counts the midpoints of an even grid on [0.1, 1] times 10^(i-6), CELLS = 2^i of them
(2^(i+1) unsigned). Counted from 1 (from 2 unsigned) over all decades, midpoint number `rank` is CELLS + its place.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(code, SIGNED: tl.constexpr):
    """The value in [-1, 1] of an 8-bit code."""
    FIRST: tl.constexpr = 1 if SIGNED else 2
    number = code.to(tl.int32)
    rank = (tl.abs(number - 127) if SIGNED else number + 1).to(tl.float32)
    power = tl.full(rank.shape, 1e-6, tl.float32)
    cells = tl.full(rank.shape, FIRST, tl.float32)
    per_cell = tl.full(rank.shape, 1.0 / FIRST, tl.float32)
    for i in tl.static_range(1, 7):
        above = rank >= FIRST * 2**i
        power = tl.where(above, 10.0 ** (i - 6), power)
        cells = tl.where(above, FIRST * 2.0**i, cells)
        per_cell = tl.where(above, 0.5**i / FIRST, per_cell)
    value = power * (0.1 + 0.9 * (rank - cells + 0.5) * per_cell)
    value = tl.where(rank >= FIRST, value, 0.0)
    value = tl.where(number == 255, 1.0, value)
    if SIGNED:
        value = tl.where(number < 127, -value, value)
    return value


@triton.jit
def encode(value, SIGNED: tl.constexpr):
    """The code nearest to a value in [-1, 1]."""
    FIRST: tl.constexpr = 1 if SIGNED else 2
    a = tl.abs(value)
    cells = tl.full(a.shape, FIRST, tl.float32)
    inverse = tl.full(a.shape, 1e6, tl.float32)
    for i in tl.static_range(6):
        # halfway between the last midpoint of decade i and the first of decade i + 1
        above = a > 10.0 ** (i - 6) * (1.0 + 0.9 * 0.5**i / FIRST)
        cells = tl.where(above, FIRST * 2.0 ** (i + 1), cells)
        inverse = tl.where(above, 10.0 ** (5 - i), inverse)
    place = tl.floor((a * inverse - 0.1) * (cells * (1.0 / 0.9)))
    rank = cells + tl.minimum(tl.maximum(place, 0.0), cells - 1.0)
    rank = tl.where(a > 0.5e-6 * (0.1 + 0.45 / FIRST), rank, FIRST - 1.0).to(tl.int32)
    if SIGNED:
        code = tl.where(value < 0.0, 127 - rank, 127 + rank)
    else:
        code = rank - 1
    return tl.where(value > 1.0 - 0.225 / (64 * FIRST), 255, code).to(tl.uint8)


@triton.jit
def hash32(x):
    """A 32-bit mixer by xor-shift and multiply, as in the reference."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _to_bfloat16(value, noise):
    """float32 whose low half is 0."""
    bits = (value.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _to_float16(value, noise):
    """float32 that float16 holds: a multiple of 2^-10 of the value's power of two, at least of 2^-24."""
    bits = value.to(tl.int32, bitcast=True)
    unit = tl.maximum(bits & 0x7F800000, 113 << 23) - (10 << 23)
    scaled = tl.abs(value) * ((254 << 23) - unit).to(tl.float32, bitcast=True)
    whole = tl.floor(scaled)
    up = noise.to(tl.float32) < (scaled - whole) * 65536.0
    size = (whole + up.to(tl.float32)) * unit.to(tl.float32, bitcast=True)
    return tl.where(bits < 0, -size, size)


@triton.jit
def _round_stochastically(value, i, key, HALF: tl.constexpr):
    """What the parameter's 16 bits hold: up with the probability of the remainder; inf and NaN stay."""
    low = i.to(tl.uint32)
    high = (i >> 32).to(tl.uint32)
    noise = hash32(low ^ hash32(high ^ tl.cast(key, tl.uint32))) & 0xFFFF
    drawn = _to_float16(value, noise) if HALF else _to_bfloat16(value, noise)
    return tl.where(tl.abs(value) < float("inf"), drawn, value)


@triton.jit
def _taken(row_ptr, finite_ptr):
    """Whether the step is taken; the first program counts it. The others read no count: the order does not matter."""
    taken = tl.load(row_ptr + 9) != 0.0
    if finite_ptr is not None:
        taken = taken & (tl.load(finite_ptr) != 0)
    if tl.program_id(0) == 0:
        count = tl.load(row_ptr + 11).to(tl.int32, bitcast=True) + taken.to(tl.int32)
        tl.store(row_ptr + 11, count.to(tl.float32, bitcast=True))
    return taken


@triton.jit
def _moments(row_ptr, g, m, v):
    g = g.to(tl.float32) * tl.load(row_ptr + 8)
    m = tl.load(row_ptr) * m + tl.load(row_ptr + 2) * g
    v = tl.load(row_ptr + 1) * v + tl.load(row_ptr + 3) * g * g
    return m, v


@triton.jit
def _update(param_ptr, row_ptr, i, inside, m, v, STOCHASTIC: tl.constexpr):
    p = tl.load(param_ptr + i, mask=inside, other=0.0).to(tl.float32) * tl.load(row_ptr + 6)
    p = (p - tl.load(row_ptr + 4) * (m / (tl.sqrt(v) + tl.load(row_ptr + 5)))) * tl.load(row_ptr + 7)
    if STOCHASTIC:
        key = tl.load(row_ptr + 10).to(tl.int32, bitcast=True)
        p = _round_stochastically(p, i, key, param_ptr.dtype.element_ty == tl.float16)
    tl.store(param_ptr + i, p.to(param_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _recode(state_ptr, absmax_ptr, i, inside, block, blocks, values, SIGNED: tl.constexpr):
    values = tl.where(inside, values, 0.0)
    absmax = tl.max(tl.abs(values), 1)
    tl.store(absmax_ptr + block, absmax, mask=block < blocks)
    safe = tl.where(absmax > 0.0, absmax, 1.0)
    tl.store(state_ptr + i, encode(values / safe[:, None], SIGNED), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def adamw8bit_kernel(
    param_ptr,
    grad_ptr,
    state1_ptr,
    state2_ptr,
    absmax1_ptr,
    absmax2_ptr,
    row_ptr,
    finite_ptr,
    n,
    blocks,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """ROWS blocks of BLOCK_SIZE elements (COLS is the power of two that holds one)."""
    if not _taken(row_ptr, finite_ptr):
        return
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLS)
    i = block[:, None] * BLOCK_SIZE + column[None, :]
    inside = (i < n) & (column < BLOCK_SIZE)[None, :]
    g = tl.load(grad_ptr + i, mask=inside, other=0.0)
    scale1 = tl.load(absmax1_ptr + block, mask=block < blocks, other=0.0)
    scale2 = tl.load(absmax2_ptr + block, mask=block < blocks, other=0.0)
    m = decode(tl.load(state1_ptr + i, mask=inside, other=0), True) * scale1[:, None]
    v = decode(tl.load(state2_ptr + i, mask=inside, other=0), False) * scale2[:, None]
    m, v = _moments(row_ptr, g, m, v)
    _update(param_ptr, row_ptr, i, inside, m, v, STOCHASTIC)
    _recode(state1_ptr, absmax1_ptr, i, inside, block, blocks, m, True)
    _recode(state2_ptr, absmax2_ptr, i, inside, block, blocks, v, False)


@triton.jit
def adamw32bit_kernel(
    param_ptr,
    grad_ptr,
    m_ptr,
    v_ptr,
    row_ptr,
    finite_ptr,
    n,
    BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    if not _taken(row_ptr, finite_ptr):
        return
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    g = tl.load(grad_ptr + i, mask=inside, other=0.0)
    m, v = tl.load(m_ptr + i, mask=inside, other=0.0), tl.load(v_ptr + i, mask=inside, other=0.0)
    m, v = _moments(row_ptr, g, m, v)
    tl.store(m_ptr + i, m, mask=inside)
    tl.store(v_ptr + i, v, mask=inside)
    _update(param_ptr, row_ptr, i, inside, m, v, STOCHASTIC)
