"""group_norm_silu of small images in one launch: a program holds a whole group of a sample in registers.

Half of SD1.5's norms are at 16x16 and 8x8, where a group is 20 to 40 KiB: their three launches of a few microseconds
wait for one another longer than they work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._math import silu, silu_slope
from .triton_kernels import _affine


@triton.jit
def _group(ptr, stride_b, stride_c, stride_s, c, s, WIDTH: tl.constexpr):
    """The addresses of this program's group, [c, s]: group program_id(0) of sample program_id(1)."""
    base = ptr + tl.program_id(1).to(tl.int64) * stride_b + tl.program_id(0).to(tl.int64) * WIDTH * stride_c
    return base + c[:, None] * stride_c + s[None, :] * stride_s


@triton.jit
def gn_group_kernel(
    x_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    pixels,
    eps,
    x_stride_b,
    x_stride_c,
    x_stride_s,
    y_stride_b,
    y_stride_c,
    y_stride_s,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    c = tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    inside = c < WIDTH
    mask = inside[:, None] & (s < pixels)[None, :]
    x = tl.load(_group(x_ptr, x_stride_b, x_stride_c, x_stride_s, c, s, WIDTH), mask=mask, other=0.0).to(tl.float32)
    size = tl.cast(pixels, tl.float32) * WIDTH
    mean = tl.sum(tl.sum(x, 1), 0) / size
    d = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(d * d, 1), 0) / size + eps)
    at = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(mean_ptr + at, mean)
    tl.store(rstd_ptr + at, rstd)
    weight, bias = _affine(weight_ptr, bias_ptr, tl.program_id(0) * WIDTH + c, inside, HAS_WEIGHT, HAS_BIAS)
    z = d * (rstd * weight)[:, None] + bias[:, None]
    if SILU:
        z = silu(z)
    y_at = _group(y_ptr, y_stride_b, y_stride_c, y_stride_s, c, s, WIDTH)
    tl.store(y_at, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gn_group_bwd_kernel(
    x_ptr,
    dy_ptr,
    dx_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    dot_ptr,
    pixels,
    x_stride_b,
    x_stride_c,
    x_stride_s,
    y_stride_b,
    y_stride_c,
    y_stride_s,
    d_stride_b,
    d_stride_c,
    d_stride_s,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    WANT_SUM: tl.constexpr,
    WANT_DOT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx of a group, and its channels' sums of dz (the bias') and dz x_hat (the weight's), [B, C]."""
    c = tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    inside = c < WIDTH
    mask = inside[:, None] & (s < pixels)[None, :]
    x = tl.load(_group(x_ptr, x_stride_b, x_stride_c, x_stride_s, c, s, WIDTH), mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(_group(dy_ptr, y_stride_b, y_stride_c, y_stride_s, c, s, WIDTH), mask=mask, other=0.0)
    at = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    rstd = tl.load(rstd_ptr + at)
    x_hat = (x - tl.load(mean_ptr + at)) * rstd
    channel = tl.program_id(0) * WIDTH + c
    weight, bias = _affine(weight_ptr, bias_ptr, channel, inside, HAS_WEIGHT, HAS_BIAS)
    dz = dy.to(tl.float32)
    if SILU:
        dz = dz * silu_slope(x_hat * weight[:, None] + bias[:, None])
    sums = tl.sum(dz, 1)
    dots = tl.sum(dz * x_hat, 1)
    slot = tl.program_id(1) * tl.num_programs(0) * WIDTH + channel
    if WANT_SUM:
        tl.store(sum_ptr + slot, sums.to(sum_ptr.dtype.element_ty), mask=inside)
    if WANT_DOT:
        tl.store(dot_ptr + slot, dots.to(dot_ptr.dtype.element_ty), mask=inside)
    size = tl.cast(pixels, tl.float32) * WIDTH
    dx = (dz * weight[:, None] - tl.sum(weight * sums, 0) / size - x_hat * (tl.sum(weight * dots, 0) / size)) * rstd
    dx_at = _group(dx_ptr, d_stride_b, d_stride_c, d_stride_s, c, s, WIDTH)
    tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
