"""The Triton kernel of frozen_conv: an implicit matrix product of output pixels x output channels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pixels", "in_h", "in_w", "out_h", "out_w", "tiles_n", "padding"])
def frozen_conv_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    pixels,
    outs,
    ins,
    in_h,
    in_w,
    out_h,
    out_w,
    tiles_n,
    padding,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yb,
    stride_yc,
    stride_yh,
    stride_yw,
    stride_wo,
    stride_wc,
    stride_wi,
    stride_wj,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of output pixels x output channels; GATHER: the input pixel is (output + padding - tap) / STRIDE."""
    pid = tl.program_id(0)
    p = pid // tiles_n * BLOCK_P + tl.arange(0, BLOCK_P)
    o = pid % tiles_n * BLOCK_O + tl.arange(0, BLOCK_O)
    column, row = p % out_w, p // out_w % out_h
    sample = (p // (out_w * out_h)).to(tl.int64)
    y = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    c_blocks = tl.cdiv(ins, BLOCK_C)
    for step in range(KH * KW * c_blocks):
        tap = step // c_blocks
        c = step % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        i, j = tap // KW, tap % KW
        if GATHER:
            up, left = row + padding - i, column + padding - j
            inside = (up >= 0) & (left >= 0) & (up % STRIDE == 0) & (left % STRIDE == 0)
            up, left = up // STRIDE, left // STRIDE
        else:
            up, left = row * STRIDE - padding + i, column * STRIDE - padding + j
            inside = (up >= 0) & (left >= 0)
        inside = inside & (up < in_h) & (left < in_w) & (p < pixels)
        at = x_ptr + sample * stride_xb + up.to(tl.int64) * stride_xh + left.to(tl.int64) * stride_xw
        x_at = at[:, None] + c[None, :].to(tl.int64) * stride_xc
        x = tl.load(x_at, mask=inside[:, None] & (c < ins)[None, :], other=0.0)
        w_at = w_ptr + i * stride_wi + j * stride_wj + o[None, :] * stride_wo + c[:, None] * stride_wc
        w = tl.load(w_at, mask=(c < ins)[:, None] & (o < outs)[None, :], other=0.0)
        y = tl.dot(x, w, y, input_precision="ieee")
    if HAS_BIAS:
        y += tl.load(bias_ptr + o, mask=o < outs, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + sample * stride_yb + row.to(tl.int64) * stride_yh + column.to(tl.int64) * stride_yw
    y_at = at[:, None] + o[None, :].to(tl.int64) * stride_yc
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(p < pixels)[:, None] & (o < outs)[None, :])
