"""The Triton kernel of int8_weight: blocks of 64 codes and their scales, several a program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["total", "blocks_a_row"])
def int8_expand_kernel(
    codes_ptr,
    scales_ptr,
    w_ptr,
    total,
    inputs,
    blocks_a_row,
    WHOLE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """WHOLE: rows end with a whole block, so that the blocks of all rows follow one another in memory."""
    b = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    k = tl.arange(0, WIDTH)
    there = b < total
    # a scale is the upper half of a float32
    scale = (tl.load(scales_ptr + b, mask=there, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if WHOLE:
        at = b.to(tl.int64)[:, None] * WIDTH + k[None, :]
        mask = there[:, None]
    else:
        first = b % blocks_a_row * WIDTH
        at = (b // blocks_a_row).to(tl.int64)[:, None] * inputs + first[:, None] + k[None, :]
        mask = there[:, None] & (first[:, None] + k[None, :] < inputs)
    code = tl.load(codes_ptr + at, mask=mask, other=0)
    tl.store(w_ptr + at, (code.to(tl.float32) * scale[:, None]).to(w_ptr.dtype.element_ty), mask=mask)
