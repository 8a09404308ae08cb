"""The Triton kernels of group_norm_silu.

x is seen as [B, C, S] with any strides (S pixels): channels-last and NCHW differ only in the tile's shape. A sum over
pixels is split: a program owns one split of the pixels for a tile of channels and writes its own slot of
part [B, SPLITS, C]; a second small kernel combines the slots of each group in order. No atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._math import silu, silu_slope


@triton.jit
def _tile(ptr, b, c, s, channels, last, stride_b, stride_c, stride_s):
    """The addresses and mask of channels c x pixels s of sample b."""
    base = ptr + b.to(tl.int64) * stride_b
    at = base + c[:, None].to(tl.int64) * stride_c + s[None, :].to(tl.int64) * stride_s
    return at, (c < channels)[:, None] & (s < last)[None, :]


@triton.jit
def _affine(weight_ptr, bias_ptr, c, inside, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    weight = tl.full(c.shape, 1.0, tl.float32)
    bias = tl.zeros(c.shape, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit(do_not_specialize=["splits"])
def gn_stats_kernel(
    x_ptr,
    mean_ptr,
    m2_ptr,
    channels,
    pixels,
    splits,
    per_split,
    stride_b,
    stride_c,
    stride_s,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Mean and centred sum of squares of each channel over one split of the pixels."""
    pid = tl.program_id(0)
    b, split = pid // splits, pid % splits
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = split * per_split
    last = tl.minimum(first + per_split, pixels)
    # sums are taken around the mean of the first tile: no cancellation where |mean| is much above the deviation
    s = first + tl.arange(0, BLOCK_S)
    at, mask = _tile(x_ptr, b, c, s, channels, last, stride_b, stride_c, stride_s)
    head = tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32), 1)
    shift = head / tl.minimum(last - first, BLOCK_S).to(tl.float32)
    sums = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    squares = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at, mask = _tile(x_ptr, b, c, s, channels, last, stride_b, stride_c, stride_s)
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, x - shift[:, None], 0.0)
        sums += d
        squares += d * d
    count = (last - first).to(tl.float32)
    total = tl.sum(sums, 1)
    slot = pid.to(tl.int64) * channels + c
    tl.store(mean_ptr + slot, shift + total / count, mask=c < channels)
    tl.store(m2_ptr + slot, tl.sum(squares, 1) - total * total / count, mask=c < channels)


@triton.jit(do_not_specialize=["splits", "groups"])
def gn_combine_kernel(
    part_mean_ptr,
    part_m2_ptr,
    mean_ptr,
    rstd_ptr,
    channels,
    pixels,
    splits,
    per_split,
    groups,
    eps,
    BLOCK: tl.constexpr,
):
    """One (sample, group): its mean and 1 / deviation from the slots of its channels."""
    pid = tl.program_id(0)
    b, group = pid // groups, pid % groups
    width = channels // groups
    base = b.to(tl.int64) * splits * channels + group * width
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits * width, BLOCK):
        i = start + lanes
        split = i // width
        count = tl.minimum(per_split, pixels - split * per_split).to(tl.float32)
        mean = tl.load(part_mean_ptr + base + split * channels + i % width, mask=i < splits * width, other=0.0)
        total += tl.where(i < splits * width, count * mean, 0.0)
    size = tl.cast(pixels, tl.float32) * tl.cast(width, tl.float32)
    center = tl.sum(total, 0) / size
    spread = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits * width, BLOCK):
        i = start + lanes
        split = i // width
        count = tl.minimum(per_split, pixels - split * per_split).to(tl.float32)
        at = base + split * channels + i % width
        mean = tl.load(part_mean_ptr + at, mask=i < splits * width, other=0.0)
        m2 = tl.load(part_m2_ptr + at, mask=i < splits * width, other=0.0)
        spread += tl.where(i < splits * width, m2 + count * (mean - center) * (mean - center), 0.0)
    variance = tl.maximum(tl.sum(spread, 0) / size, 0.0)
    tl.store(mean_ptr + pid, center)
    tl.store(rstd_ptr + pid, 1.0 / tl.sqrt(variance + eps))


@triton.jit(do_not_specialize=["groups", "tiles"])
def gn_apply_kernel(
    x_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    channels,
    pixels,
    tiles,
    groups,
    x_stride_b,
    x_stride_c,
    x_stride_s,
    y_stride_b,
    y_stride_c,
    y_stride_s,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    pid = tl.program_id(0)
    b = pid // tiles
    s = (pid % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    at_group = b * groups + c // (channels // groups)
    mean = tl.load(mean_ptr + at_group, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + at_group, mask=inside, other=0.0)
    weight, bias = _affine(weight_ptr, bias_ptr, c, inside, HAS_WEIGHT, HAS_BIAS)
    at, mask = _tile(x_ptr, b, c, s, channels, pixels, x_stride_b, x_stride_c, x_stride_s)
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    z = (x - mean[:, None]) * (rstd * weight)[:, None] + bias[:, None]
    if SILU:
        z = silu(z)
    at, mask = _tile(y_ptr, b, c, s, channels, pixels, y_stride_b, y_stride_c, y_stride_s)
    tl.store(at, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_tile(x_at, dy_at, mask, mean, rstd, weight, bias, SILU: tl.constexpr):
    """dz and x_hat of one tile; dz is 0 outside."""
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    dz = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
    x_hat = (x - mean[:, None]) * rstd[:, None]
    if SILU:
        dz = dz * silu_slope(x_hat * weight[:, None] + bias[:, None])
    return dz, x_hat


@triton.jit(do_not_specialize=["splits", "groups"])
def gn_bwd_sums_kernel(
    x_ptr,
    dy_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    dot_ptr,
    channels,
    pixels,
    splits,
    per_split,
    groups,
    x_stride_b,
    x_stride_c,
    x_stride_s,
    y_stride_b,
    y_stride_c,
    y_stride_s,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """sum dz and sum dz x_hat of each channel over one split of the pixels."""
    pid = tl.program_id(0)
    b, split = pid // splits, pid % splits
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    at_group = b * groups + c // (channels // groups)
    mean = tl.load(mean_ptr + at_group, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + at_group, mask=inside, other=0.0)
    weight, bias = _affine(weight_ptr, bias_ptr, c, inside, HAS_WEIGHT, HAS_BIAS)
    first = split * per_split
    last = tl.minimum(first + per_split, pixels)
    sums = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    dots = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        x_at, mask = _tile(x_ptr, b, c, s, channels, last, x_stride_b, x_stride_c, x_stride_s)
        dy_at, _ = _tile(dy_ptr, b, c, s, channels, last, y_stride_b, y_stride_c, y_stride_s)
        dz, x_hat = _grad_tile(x_at, dy_at, mask, mean, rstd, weight, bias, SILU)
        sums += dz
        dots += dz * x_hat
    slot = pid.to(tl.int64) * channels + c
    tl.store(sum_ptr + slot, tl.sum(sums, 1), mask=inside)
    tl.store(dot_ptr + slot, tl.sum(dots, 1), mask=inside)


@triton.jit(do_not_specialize=["splits", "groups"])
def gn_bwd_combine_kernel(
    sum_ptr,
    dot_ptr,
    weight_ptr,
    mean_sum_ptr,
    mean_dot_ptr,
    channels,
    pixels,
    splits,
    groups,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One (sample, group): the means of weight dz and of weight dz x_hat."""
    pid = tl.program_id(0)
    b, group = pid // groups, pid % groups
    width = channels // groups
    base = b.to(tl.int64) * splits * channels + group * width
    sums = tl.zeros([BLOCK], tl.float32)
    dots = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits * width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < splits * width
        at = base + (i // width) * channels + i % width
        weight, _ = _affine(weight_ptr, weight_ptr, group * width + i % width, inside, HAS_WEIGHT, False)
        sums += weight * tl.load(sum_ptr + at, mask=inside, other=0.0)
        dots += weight * tl.load(dot_ptr + at, mask=inside, other=0.0)
    size = tl.cast(pixels, tl.float32) * tl.cast(width, tl.float32)
    tl.store(mean_sum_ptr + pid, tl.sum(sums, 0) / size)
    tl.store(mean_dot_ptr + pid, tl.sum(dots, 0) / size)


@triton.jit(do_not_specialize=["groups", "tiles"])
def gn_bwd_x_kernel(
    x_ptr,
    dy_ptr,
    dx_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    mean_sum_ptr,
    mean_dot_ptr,
    channels,
    pixels,
    tiles,
    groups,
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
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx = rstd (weight dz - <weight dz> - x_hat <weight dz x_hat>)"""
    pid = tl.program_id(0)
    b = pid // tiles
    s = (pid % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    at_group = b * groups + c // (channels // groups)
    mean = tl.load(mean_ptr + at_group, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + at_group, mask=inside, other=0.0)
    mean_sum = tl.load(mean_sum_ptr + at_group, mask=inside, other=0.0)
    mean_dot = tl.load(mean_dot_ptr + at_group, mask=inside, other=0.0)
    weight, bias = _affine(weight_ptr, bias_ptr, c, inside, HAS_WEIGHT, HAS_BIAS)
    x_at, mask = _tile(x_ptr, b, c, s, channels, pixels, x_stride_b, x_stride_c, x_stride_s)
    dy_at, _ = _tile(dy_ptr, b, c, s, channels, pixels, y_stride_b, y_stride_c, y_stride_s)
    dz, x_hat = _grad_tile(x_at, dy_at, mask, mean, rstd, weight, bias, SILU)
    dx = (dz * weight[:, None] - mean_sum[:, None] - x_hat * mean_dot[:, None]) * rstd[:, None]
    at, _ = _tile(dx_ptr, b, c, s, channels, pixels, d_stride_b, d_stride_c, d_stride_s)
    tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
