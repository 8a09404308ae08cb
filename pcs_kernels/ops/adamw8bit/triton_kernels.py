"""The Triton kernels of adamw8bit: one pass over parameter, gradient and states, of one tensor or of many at once.

A code is decoded by the map itself, and found again by two look-ups (codes.search_tables). Of the tables, what a block's
values reach stays in the L1 cache: the codes' 2 KiB, and 128 bytes for each octave of the values.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def encode(value, bounds_ptr, first_ptr):
    """The code nearest to a value in [-1, 1]."""
    code = tl.load(first_ptr + (value.to(tl.uint32, bitcast=True) >> 16))
    return code + (value > tl.load(bounds_ptr + code)).to(tl.uint8)


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
def _round_stochastically(value, low, high, key, HALF: tl.constexpr):
    """What 16 bits hold of element high * 2^32 + low: up with the probability of the remainder; inf and NaN stay."""
    noise = hash32(low.to(tl.uint32) ^ hash32(high.to(tl.uint32) ^ tl.cast(key, tl.uint32))) & 0xFFFF
    drawn = _to_float16(value, noise) if HALF else _to_bfloat16(value, noise)
    return tl.where(tl.abs(value) < float("inf"), drawn, value)


@triton.jit
def _taken(row_ptr, finite_ptr, is_first):
    """Whether the step is taken; the tensor's first program counts it. The others read no count: any order will do."""
    taken = tl.load(row_ptr + 9) != 0.0
    if finite_ptr is not None:
        taken = taken & (tl.load(finite_ptr) != 0)
    if is_first:
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
def _update(param_ptr, row_ptr, i, inside, low, high, m, v, STOCHASTIC: tl.constexpr):
    """Element i of param_ptr, whose number in the tensor is high * 2^32 + low."""
    p = tl.load(param_ptr + i, mask=inside, other=0.0).to(tl.float32) * tl.load(row_ptr + 6)
    p = (p - tl.load(row_ptr + 4) * (m / (tl.sqrt(v) + tl.load(row_ptr + 5)))) * tl.load(row_ptr + 7)
    if STOCHASTIC:
        key = tl.load(row_ptr + 10).to(tl.int32, bitcast=True)
        p = _round_stochastically(p, low, high, key, param_ptr.dtype.element_ty == tl.float16)
    tl.store(param_ptr + i, p.to(param_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _recode(state_ptr, absmax_ptr, i, inside, row, count, values, bounds_ptr, first_ptr, SIGNED: tl.constexpr):
    absmax = tl.max(tl.abs(values) if SIGNED else values, 1)
    tl.store(absmax_ptr + row, absmax, mask=row < count)
    # below 5e-38 the inverse overflows; such states are zero for every purpose
    inverse = tl.where(absmax > 5e-38, 1.0 / tl.maximum(absmax, 5e-38), 0.0)
    code = encode(values * inverse[:, None], bounds_ptr, first_ptr)
    tl.store(state_ptr + i, code, mask=inside)


@triton.jit
def _step_8bit(
    param_ptr,
    grad_ptr,
    state1_ptr,
    state2_ptr,
    absmax1_ptr,
    absmax2_ptr,
    row_ptr,
    map1_ptr,
    map2_ptr,
    bounds1_ptr,
    bounds2_ptr,
    first1_ptr,
    first2_ptr,
    n,
    tile,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """ROWS blocks of BLOCK_SIZE elements (COLS is the power of two that holds one), the tensor's tile number `tile`.

    Addresses within the tile are of 32 bits; a block never crosses a multiple of 2^32, which the random bits see.
    """
    start = tile.to(tl.int64) * (ROWS * BLOCK_SIZE)
    left = tl.minimum(n - start, ROWS * BLOCK_SIZE).to(tl.int32)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLS)
    i = row[:, None] * BLOCK_SIZE + column[None, :]
    inside = i < left
    if COLS > BLOCK_SIZE:
        inside = inside & (column < BLOCK_SIZE)[None, :]
    count = (left + BLOCK_SIZE - 1) // BLOCK_SIZE
    absmax1_ptr += tile.to(tl.int64) * ROWS
    absmax2_ptr += tile.to(tl.int64) * ROWS
    g = tl.load(grad_ptr + start + i, mask=inside, other=0.0)
    scale1 = tl.load(absmax1_ptr + row, mask=row < count, other=0.0)
    scale2 = tl.load(absmax2_ptr + row, mask=row < count, other=0.0)
    # beyond the end the codes are of zero, 127 and 0, so that no scale grows by them
    m = tl.load(map1_ptr + tl.load(state1_ptr + start + i, mask=inside, other=127)) * scale1[:, None]
    v = tl.load(map2_ptr + tl.load(state2_ptr + start + i, mask=inside, other=0)) * scale2[:, None]
    m, v = _moments(row_ptr, g, m, v)
    first = start + row * BLOCK_SIZE
    low, high = first.to(tl.uint32)[:, None] + column.to(tl.uint32)[None, :], (first >> 32)[:, None]
    _update(param_ptr + start, row_ptr, i, inside, low, high, m, v, STOCHASTIC)
    _recode(state1_ptr + start, absmax1_ptr, i, inside, row, count, m, bounds1_ptr, first1_ptr, True)
    _recode(state2_ptr + start, absmax2_ptr, i, inside, row, count, v, bounds2_ptr, first2_ptr, False)


@triton.jit
def adamw8bit_kernel(
    param_ptr,
    grad_ptr,
    state1_ptr,
    state2_ptr,
    absmax1_ptr,
    absmax2_ptr,
    row_ptr,
    finite_ptr,
    map1_ptr,
    map2_ptr,
    bounds1_ptr,
    bounds2_ptr,
    first1_ptr,
    first2_ptr,
    n,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """One tensor."""
    tile = tl.program_id(0)
    if not _taken(row_ptr, finite_ptr, tile == 0):
        return
    _step_8bit(
        param_ptr,
        grad_ptr,
        state1_ptr,
        state2_ptr,
        absmax1_ptr,
        absmax2_ptr,
        row_ptr,
        map1_ptr,
        map2_ptr,
        bounds1_ptr,
        bounds2_ptr,
        first1_ptr,
        first2_ptr,
        n,
        tile,
        BLOCK_SIZE,
        ROWS,
        COLS,
        STOCHASTIC,
    )


@triton.jit
def _step_32bit(
    param_ptr, grad_ptr, m_ptr, v_ptr, row_ptr, n, tile, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr
):
    start = tile.to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = i < tl.minimum(n - start, BLOCK).to(tl.int32)
    g = tl.load(grad_ptr + start + i, mask=inside, other=0.0)
    m = tl.load(m_ptr + start + i, mask=inside, other=0.0)
    v = tl.load(v_ptr + start + i, mask=inside, other=0.0)
    m, v = _moments(row_ptr, g, m, v)
    tl.store(m_ptr + start + i, m, mask=inside)
    tl.store(v_ptr + start + i, v, mask=inside)
    low = start.to(tl.uint32) + i.to(tl.uint32)
    _update(param_ptr + start, row_ptr, i, inside, low, start >> 32, m, v, STOCHASTIC)


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
    """One tensor whose states are float32."""
    tile = tl.program_id(0)
    if not _taken(row_ptr, finite_ptr, tile == 0):
        return
    _step_32bit(param_ptr, grad_ptr, m_ptr, v_ptr, row_ptr, n, tile, BLOCK, STOCHASTIC)


@triton.jit
def _entry(table_ptr, tiles_ptr, rows_ptr):
    """(the tensor's line of the table, its size, its row of numbers, this program's tile of it)."""
    program = tl.program_id(0)
    line_ptr = table_ptr + tl.load(tiles_ptr + program).to(tl.int64) * 16
    tile = program - tl.load(line_ptr + 7).to(tl.int32)
    row_ptr = tl.multiple_of(rows_ptr + tl.load(line_ptr + 8) * 12, 4)
    return line_ptr, tl.load(line_ptr + 6), row_ptr, tile


@triton.jit
def _pointer(line_ptr, i: tl.constexpr, TYPE: tl.constexpr):
    return tl.multiple_of(tl.load(line_ptr + i).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def adamw8bit_many_kernel(
    table_ptr,
    tiles_ptr,
    rows_ptr,
    map1_ptr,
    map2_ptr,
    bounds1_ptr,
    bounds2_ptr,
    first1_ptr,
    first2_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Every tensor of a table (many.py)."""
    line_ptr, n, row_ptr, tile = _entry(table_ptr, tiles_ptr, rows_ptr)
    if n == 0:  # a table that nothing has filled yet
        return
    if not _taken(row_ptr, None, tile == 0):
        return
    _step_8bit(
        _pointer(line_ptr, 0, PARAM),
        _pointer(line_ptr, 1, GRAD),
        _pointer(line_ptr, 2, tl.uint8),
        _pointer(line_ptr, 3, tl.uint8),
        _pointer(line_ptr, 4, tl.float32),
        _pointer(line_ptr, 5, tl.float32),
        row_ptr,
        map1_ptr,
        map2_ptr,
        bounds1_ptr,
        bounds2_ptr,
        first1_ptr,
        first2_ptr,
        n,
        tile,
        BLOCK_SIZE,
        ROWS,
        COLS,
        STOCHASTIC,
    )


@triton.jit
def adamw32bit_many_kernel(
    table_ptr,
    tiles_ptr,
    rows_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Every tensor of a table, whose states are float32."""
    line_ptr, n, row_ptr, tile = _entry(table_ptr, tiles_ptr, rows_ptr)
    if n == 0:
        return
    if not _taken(row_ptr, None, tile == 0):
        return
    m_ptr, v_ptr = _pointer(line_ptr, 2, tl.float32), _pointer(line_ptr, 3, tl.float32)
    param_ptr, grad_ptr = _pointer(line_ptr, 0, PARAM), _pointer(line_ptr, 1, GRAD)
    _step_32bit(param_ptr, grad_ptr, m_ptr, v_ptr, row_ptr, n, tile, BLOCK, STOCHASTIC)
