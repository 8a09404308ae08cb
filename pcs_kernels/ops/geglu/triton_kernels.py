"""The Triton kernels of geglu: M rows, F output features; x [M, 2F], y [M, F]."""

from __future__ import annotations

import triton
import triton.language as tl

from ..._math import normal_cdf, normal_pdf


@triton.jit(do_not_specialize=["rows"])
def geglu_fwd_kernel(x_ptr, y_ptr, rows, features, stride_xm, stride_xf, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (m < rows)[:, None] & (f < features)[None, :]
    m = m.to(tl.int64)
    a_at = x_ptr + m[:, None] * stride_xm + f[None, :] * stride_xf
    a = tl.load(a_at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(a_at + features * stride_xf, mask=mask, other=0.0).to(tl.float32)
    y = a * b * normal_cdf(b)
    tl.store(y_ptr + m[:, None] * features + f[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def geglu_bwd_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    rows,
    features,
    stride_ym,
    stride_yf,
    stride_xm,
    stride_xf,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (m < rows)[:, None] & (f < features)[None, :]
    m = m.to(tl.int64)
    a_at = x_ptr + m[:, None] * stride_xm + f[None, :] * stride_xf
    a = tl.load(a_at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(a_at + features * stride_xf, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + m[:, None] * stride_ym + f[None, :] * stride_yf, mask=mask, other=0.0).to(tl.float32)
    cdf = normal_cdf(b)
    da_at = dx_ptr + m[:, None] * (2 * features) + f[None, :]
    tl.store(da_at, (dy * b * cdf).to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(da_at + features, (dy * a * (cdf + b * normal_pdf(b))).to(dx_ptr.dtype.element_ty), mask=mask)
