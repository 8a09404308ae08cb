"""Convolution and linear product with a frozen weight in Triton: one implicit matrix product for both directions.

B samples, C input and O output channels, P output pixels of all samples. The backward gathers: dx of a pixel is the sum
over the taps that reached it, so it is the same kernel with the channels of the weight exchanged. A linear product is a
1 x 1 convolution on 1 x 1 pixels. Library kernels are usually faster; this one runs where it is asked for by name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._launch import AotCase, blocks, current_arch, launch, meta, processors, record, unavailable
from ..._layout import image_format
from .triton_kernels import frozen_conv_kernel


class Tile(NamedTuple):
    """Output pixels and channels of a program, input channels of a step, warps and stages."""

    pixels: int
    channels: int
    step: int
    warps: int
    stages: int


# The first that gives every multiprocessor a program is taken. 64 channels divide every width of the Stable Diffusion
# UNets (320, 640, 1280). Registers as compiled by Triton 3.8 for sm_80.
TILES = (
    Tile(128, 64, 32, 8, 3),  # 108 registers; with 4 warps 168, with 128 channels 190
    Tile(64, 64, 32, 4, 3),  # 112 registers
    Tile(32, 64, 32, 4, 3),
    Tile(16, 64, 64, 4, 3),  # 64 registers leave room for a longer step
)
FLOAT32_TILE = Tile(32, 32, 32, 4, 1)  # float32 products run on plain arithmetic, with operands in registers


def launch_config(pixels: int, outs: int, arch: int, half: bool = True) -> dict[str, int]:
    """The tile for that many output pixels (of all samples) and channels.

    Args:
        pixels: output pixels of all samples.
        outs: output channels.
        arch: a tabled architecture, such as 86.
        half: whether the operands have 16 bits.

    Returns:
        The kernel's constexprs, `num_warps` and `num_stages`.
    """
    tiles = TILES if half else (FLOAT32_TILE,)
    fits = [t for t in tiles if blocks(pixels, t.pixels) * blocks(outs, t.channels) >= processors(arch)]
    tile = fits[0] if fits else tiles[-1]
    config = {"BLOCK_P": tile.pixels, "BLOCK_O": tile.channels, "BLOCK_C": tile.step}
    return config | {"num_warps": tile.warps, "num_stages": tile.stages}


def reason(x: Tensor, weight: Tensor) -> str | None:
    return unavailable(x, dots=True)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, stride: int, padding: int, gather: bool) -> Tensor:
    """x [B, C, H, W] and weight [O, C, kh, kw] into y [B, O, H', W'], any strides."""
    ins, in_h, in_w = x.shape[1:]
    batch, outs, out_h, out_w = y.shape
    pixels = batch * out_h * out_w
    config = launch_config(pixels, outs, current_arch(x.device), x.dtype != torch.float32)
    tiles_n = blocks(outs, config["BLOCK_O"])
    tensors = x, weight, x if bias is None else bias.contiguous(), y
    sizes = pixels, outs, ins, in_h, in_w, out_h, out_w, tiles_n, padding
    layout = *x.stride(), *y.stride(), *weight.stride()
    kind = {"KH": weight.shape[2], "KW": weight.shape[3], "STRIDE": stride, "GATHER": gather}
    grid = (blocks(pixels, config["BLOCK_P"]) * tiles_n,)
    launch(frozen_conv_kernel, grid, *tensors, *sizes, *layout, HAS_BIAS=bias is not None, **kind, **config)
    return y


def _new(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty [B, C, H, W] that is channels-last where `like` is."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=image_format(like))


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
