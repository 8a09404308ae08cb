"""Convolution and linear product with a frozen weight in Triton: one implicit matrix product for both directions.

B samples, C input and O output channels, P output pixels of all samples. The backward gathers: dx of a pixel is the sum
over the taps that reached it, so it is the same kernel with the channels of the weight exchanged. A linear product is a
1 x 1 convolution on 1 x 1 pixels. Library kernels are usually faster; this one runs where it is asked for by name.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._launch import MULTIPROCESSORS, AotCase, blocks, current_arch, launch, meta, record, unavailable

# output tile: pixels, channels, step over input channels, warps, stages; the first that fills the GPU
TILES = ((128, 64, 32, 8, 3), (64, 64, 32, 4, 3), (32, 64, 32, 4, 3), (16, 64, 64, 4, 3))


@triton.jit(do_not_specialize=["pixels", "in_h", "in_w", "out_h", "out_w", "tiles_n", "padding"])
def frozen_conv_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, pixels, outs, ins, in_h, in_w, out_h, out_w, tiles_n, padding,
    stride_xb, stride_xc, stride_xh, stride_xw, stride_yb, stride_yc, stride_yh, stride_yw,
    stride_wo, stride_wc, stride_wi, stride_wj,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr, GATHER: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
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


def launch_config(pixels: int, outs: int, arch: int, half: bool = True) -> dict[str, int]:
    tiles = TILES if half else ((32, 32, 32, 4, 1),)
    fits = [t for t in tiles if blocks(pixels, t[0]) * blocks(outs, t[1]) >= MULTIPROCESSORS[arch]]
    block_p, block_o, block_c, warps, stages = fits[0] if fits else tiles[-1]
    return {"BLOCK_P": block_p, "BLOCK_O": block_o, "BLOCK_C": block_c, "num_warps": warps, "num_stages": stages}


def reason(x: Tensor, weight: Tensor) -> str | None:
    return unavailable(x, dots=True)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, stride: int, padding: int, gather: bool) -> Tensor:
    """x [B, C, H, W] and weight [O, C, kh, kw] into y [B, O, H', W'], any strides."""
    ins, in_h, in_w = x.shape[1:]
    batch, outs, out_h, out_w = y.shape
    pixels = batch * out_h * out_w
    config = launch_config(pixels, outs, current_arch(x.device), x.dtype != torch.float32)
    tiles_n = blocks(outs, config["BLOCK_O"])
    launch(
        frozen_conv_kernel, (blocks(pixels, config["BLOCK_P"]) * tiles_n,), x, weight,
        x if bias is None else bias.contiguous(), y, pixels, outs, ins, in_h, in_w, out_h, out_w, tiles_n, padding,
        *x.stride(), *y.stride(), *weight.stride(), KH=weight.shape[2], KW=weight.shape[3], STRIDE=stride,
        GATHER=gather, HAS_BIAS=bias is not None, **config,
    )  # fmt: skip
    return y


def _new(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty [B, C, H, W] that is channels-last where `like` is."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def forward_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, pack: bool) -> Tensor:
    height = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
    width = (x.shape[3] + 2 * padding - weight.shape[3]) // stride + 1
    y = _new(x, (x.shape[0], weight.shape[0], height, width))
    return _run(x, weight, bias, y, stride, padding, gather=False)


def backward_conv(dy: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: int, pack: bool) -> Tensor:
    dx = _new(dy, (dy.shape[0], weight.shape[1], height, width))
    return _run(dy, weight.transpose(0, 1), None, dx, stride, padding, gather=True)


def _pixel(x: Tensor) -> Tensor:
    """[..., C] as [M, C, 1, 1]; the strides of the two ones are 0, which leaves the addresses' alignment known."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.as_strided((*rows.shape, 1, 1), (*rows.stride(), 0, 0))


def forward_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pack: bool) -> Tensor:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    _run(_pixel(x), _pixel(weight), bias, _pixel(y), 1, 0, gather=False)
    return y


def backward_linear(dy: Tensor, weight: Tensor, pack: bool) -> Tensor:
    dx = dy.new_empty((*dy.shape[:-1], weight.shape[1]))
    _run(_pixel(dy), _pixel(weight.transpose(0, 1)), None, _pixel(dx), 1, 0, gather=False)
    return dx


def aot_cases(arch: int) -> list[AotCase]:
    """A wide and a deep 3 x 3 convolution, a downsampling one, and a feed-forward product."""
    cases = []
    shapes = (
        ("SD1.5 64x64 320", 320, 320, 64, 1, torch.bfloat16),
        ("SD1.5 8x8 2560", 2560, 1280, 8, 1, torch.bfloat16),
        ("SD2.1 96x96 320", 320, 320, 96, 2, torch.bfloat16),
        ("SDXL 128x128 320", 320, 320, 128, 1, torch.float16),
    )
    for label, ins, outs, size, stride, dtype in shapes:
        x = meta(1, ins, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        w = meta(outs, ins, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
        small = size // stride
        dy = meta(1, outs, small, small, dtype=dtype).contiguous(memory_format=torch.channels_last)
        name = f"{label} {'fp16' if dtype == torch.float16 else 'bf16'}"
        cases += record(arch, name, lambda x=x, w=w, s=stride: forward_conv(x, w, None, s, 1, True))
        cases += record(arch, name, lambda dy=dy, w=w, n=size, s=stride: backward_conv(dy, w, n, n, s, 1, True))
    x, w, bias = meta(1, 4096, 640), meta(5120, 640), meta(5120)
    cases += record(arch, "SDXL linear bf16", lambda: forward_linear(x, w, bias, True))
    return cases + record(arch, "SDXL linear bf16", lambda: backward_linear(meta(1, 4096, 5120), w, True))
