"""Group normalisation and SiLU in Triton: a group in one program where that holds it; else statistics split over
pixels, combined per group, then one pass over x.

B batch, C channels, S pixels; channels-last and NCHW take the same kernels with tiles of another shape.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..._launch import AotCase, blocks, launch, meta, pow2, record, unavailable
from ..._operands import sum_partials
from .op import Needs
from .triton_group_kernels import gn_group_bwd_kernel, gn_group_kernel
from .triton_kernels import (
    gn_apply_kernel,
    gn_bwd_combine_kernel,
    gn_bwd_sums_kernel,
    gn_bwd_x_kernel,
    gn_combine_kernel,
    gn_stats_kernel,
)

COMBINE = {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}  # slots of a group added at a time: 8 a thread
MAX_SPLITS = 128  # slots of a channel: one program combines all of a group, so that more would only make it slower
# elements of a tile: 16 a thread; 8 in the backward, which holds two inputs (sm_80: 2048 take 96 registers for 72)
FORWARD_TILE, BACKWARD_TILE = 2048, 1024
# elements that a program of one launch holds, at most 16 warps of it: 64 floats a thread, or twice 32
GROUP_TILE, GROUP_BACKWARD_TILE = 32768, 16384


def group_config(x: Tensor, groups: int, backward: bool = False) -> dict[str, int] | None:
    """The tile that holds a whole group of x [B, C, S], or None where it is too large for one program.

    Args:
        x: its shape and strides.
        groups: of its channels.
        backward: whether the kernel holds two inputs.

    Returns:
        The kernel's constexprs, `num_warps` and `num_stages`.
    """
    width, pixels = x.shape[1] // groups, x.shape[2]
    block_c, block_s = pow2(width), pow2(pixels)
    tile = block_c * block_s
    reach = (width - 1) * x.stride(1) + (pixels - 1) * x.stride(2)
    if tile > (GROUP_BACKWARD_TILE if backward else GROUP_TILE) or reach >= 2**31:  # offsets in a group are 32 bits
        return None
    warps = min(max(tile // 1024, 1), 16)  # 32 elements a thread
    return {"WIDTH": width, "BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": warps, "num_stages": 1}


def launch_config(channels: int, pixels: int, channels_last: bool, backward: bool = False) -> dict[str, int]:
    """A tile of channels x pixels, long in whichever dimension is contiguous.

    Args:
        channels: of x.
        pixels: of a sample.
        channels_last: which of the two is contiguous.
        backward: whether the tile is of a backward kernel.

    Returns:
        The kernels' constexprs, `num_warps` and `num_stages`.
    """
    size = BACKWARD_TILE if backward else FORWARD_TILE
    if channels_last:
        block_c = min(pow2(channels), 128)  # 256 bytes of 16-bit channels: two whole cache lines a pixel
        block_s = size // block_c
    else:
        block_s = min(pow2(pixels), 512)  # 1 KiB of 16-bit pixels: eight whole cache lines a channel
        block_c = min(size // block_s, 16)
    return {"BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": 4, "num_stages": 1}


def split_pixels(pixels: int, channels_last: bool, block_s: int) -> tuple[int, int]:
    """Share the pixels out: enough splits to fill a GPU at batch 1, at most MAX_SPLITS slots to combine.

    Returns:
        The number of splits, and the pixels in each.
    """
    # [1, 320, 64, 64] gives 64 splits x 3 tiles of channels, or 4 x 80 in NCHW: above every card's 170 multiprocessors
    least = 4 * block_s if channels_last else 2 * block_s
    per_split = block_s * blocks(max(least, blocks(pixels, MAX_SPLITS)), block_s)
    return blocks(pixels, per_split), per_split


def reason(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *_: object) -> str | None:
    return unavailable(x, dots=False)


def _flat(x: Tensor) -> Tensor:
    """[B, C, S]; a view for every dense layout whose spatial dimensions fold."""
    return x.reshape(x.shape[0], x.shape[1], -1)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _new_like(x: Tensor) -> tuple[Tensor, Tensor, bool]:
    """A tensor of x's memory format, the [B, C, S] tensor to write, and whether that is a view of the first."""
    y = torch.empty_like(x)
    try:
        return y, y.view(x.shape[0], x.shape[1], -1), True
    except RuntimeError:  # a permuted layout without such a view
        return y, y.new_empty((x.shape[0], x.shape[1], x[0, 0].numel())), False


def _tiles(x: Tensor, backward: bool) -> tuple[dict[str, int], int, int]:
    channels, pixels = x.shape[1:]
    channels_last = x.stride(1) == 1 and channels > 1
    config = launch_config(channels, pixels, channels_last, backward)
    return config, *split_pixels(pixels, channels_last, config["BLOCK_S"])


def forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    xf = _flat(x)
    batch, channels, pixels = xf.shape
    mean, rstd = (x.new_empty((batch, groups), dtype=torch.float32) for _ in range(2))
    weight, bias = _dense(weight), _dense(bias)
    affine = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "SILU": silu}
    y, yf, is_view = _new_like(x)
    tensors = xf, yf, mean, rstd, weight, bias
    layout = *xf.stride(), *yf.stride()
    whole = group_config(xf, groups)
    if whole is not None:
        launch(gn_group_kernel, (groups, batch), *tensors, pixels, float(eps), *layout, **affine, **whole)
        return y if is_view else y.copy_(yf.view(y.shape)), mean, rstd
    config, splits, per_split = _tiles(xf, backward=False)
    columns = blocks(channels, config["BLOCK_C"])
    part = x.new_empty((2, batch, splits, channels), dtype=torch.float32)
    sizes = channels, pixels, splits, per_split
    launch(gn_stats_kernel, (batch * splits, columns), xf, part[0], part[1], *sizes, *xf.stride(), **config)
    launch(gn_combine_kernel, (batch * groups,), part[0], part[1], mean, rstd, *sizes, groups, float(eps), **COMBINE)
    tiles = blocks(pixels, config["BLOCK_S"])
    sizes = channels, pixels, tiles, groups
    launch(gn_apply_kernel, (batch * tiles, columns), *tensors, *sizes, *layout, **affine, **config)
    return y if is_view else y.copy_(yf.view(y.shape)), mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    xf, dyf = _flat(x), _flat(dy)
    mean, rstd, weight, bias = mean.contiguous(), rstd.contiguous(), _dense(weight), _dense(bias)
    batch, channels, pixels = xf.shape
    if needs.x and group_config(xf, groups, backward=True) is not None:
        return _backward_of_groups(dyf, xf, x, mean, rstd, groups, weight, bias, silu, needs)
    config, splits, per_split = _tiles(xf, backward=True)
    columns = blocks(channels, config["BLOCK_C"])
    affine = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "SILU": silu}
    part = x.new_empty((2, batch, splits, channels), dtype=torch.float32)
    inputs = xf, dyf, mean, rstd, weight, bias
    sizes = channels, pixels, splits, per_split, groups
    layout = *xf.stride(), *dyf.stride()
    grid = (batch * splits, columns)
    launch(gn_bwd_sums_kernel, grid, *inputs, part[0], part[1], *sizes, *layout, **affine, **config)
    dx = dweight = dbias = x.new_empty(0)
    if needs.weight and weight is not None:
        dweight = sum_partials(part[1].flatten(0, 1), weight.new_empty(channels))
    if needs.bias and bias is not None:
        dbias = sum_partials(part[0].flatten(0, 1), bias.new_empty(channels))
    if needs.x:
        means = x.new_empty((2, batch, groups), dtype=torch.float32)
        slots = part[0], part[1], weight, means[0], means[1]
        slot_sizes = channels, pixels, splits, groups
        launch(gn_bwd_combine_kernel, (batch * groups,), *slots, *slot_sizes, HAS_WEIGHT=weight is not None, **COMBINE)
        dx, dxf, is_view = _new_like(x)
        tiles = blocks(pixels, config["BLOCK_S"])
        tensors = xf, dyf, dxf, mean, rstd, weight, bias, means[0], means[1]
        tile_sizes, grid = (channels, pixels, tiles, groups), (batch * tiles, columns)
        launch(gn_bwd_x_kernel, grid, *tensors, *tile_sizes, *layout, *dxf.stride(), **affine, **config)
        dx = dx if is_view else dx.copy_(dxf.view(dx.shape))
    return dx, dweight, dbias


def _backward_of_groups(
    dyf: Tensor,
    xf: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` by one program a group: one launch, and one a parameter to add samples up."""
    batch, channels, pixels = xf.shape
    config = group_config(xf, groups, backward=True)
    assert config is not None
    dx, dxf, is_view = _new_like(x)
    affine = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "SILU": silu}
    dbias, dweight = (
        None if not wanted or like is None else like.new_empty(channels)
        for like, wanted in ((bias, needs.bias), (weight, needs.weight))
    )
    # one sample's sums are the gradients themselves
    parts = [
        out if out is None or batch == 1 else x.new_empty((batch, channels), dtype=torch.float32)
        for out in (dbias, dweight)
    ]
    tensors = xf, dyf, dxf, mean, rstd, weight, bias, *parts
    layout = *xf.stride(), *dyf.stride(), *dxf.stride()
    wanted = {"WANT_SUM": dbias is not None, "WANT_DOT": dweight is not None}
    launch(gn_group_bwd_kernel, (groups, batch), *tensors, pixels, *layout, **affine, **wanted, **config)
    for part, out in zip(parts, (dbias, dweight), strict=True):
        if part is not None and out is not None and batch > 1:
            sum_partials(part, out)
    none = x.new_empty(0)
    dx = dx if is_view else dx.copy_(dxf.view(dx.shape))
    return dx, none if dweight is None else dweight, x.new_empty(0) if dbias is None else dbias


def aot_cases(arch: int) -> list[AotCase]:
    """The first ResNet block, the widest one and a transformer's norm of each model, both layouts."""
    shapes = (
        ("SD1.5 64x64", (1, 320, 64, 64), True),
        ("SD1.5 16x16", (1, 1280, 16, 16), True),
        ("SD1.5 8x8", (1, 2560, 8, 8), True),
        ("SD2.1 96x96", (1, 320, 96, 96), False),
        ("SDXL 128x128", (1, 320, 128, 128), True),
    )
    cases = []
    for label, shape, silu in shapes:
        for layout in (torch.channels_last, torch.contiguous_format):
            x = meta(*shape).contiguous(memory_format=layout)
            weight = meta(shape[1])
            stats = meta(1, 32, dtype=torch.float32)
            name = f"{label} {'NHWC' if layout == torch.channels_last else 'NCHW'} bf16"
            cases += record(arch, name, lambda x=x, w=weight, s=silu: forward(x, 32, w, w, 1e-5, s))
            everything = Needs(True, True, True)
            call = functools.partial(backward, x, x, stats, stats, 32, weight, weight, silu, everything)
            cases += record(arch, name, call)
    half = meta(2, 640, 32, 32, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    weight = meta(640, dtype=torch.float32)
    return cases + record(arch, "SD1.5 32x32 NHWC fp16", lambda: forward(half, 32, weight, weight, 1e-6, False))
