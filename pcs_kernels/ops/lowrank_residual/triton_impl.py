"""A frozen projection with a masked low-rank residual in Triton.

B samples, L rows of a sample, C_in and C_out features, R rank, K concepts. Narrow ranks are summed in the product's own
loop; wide ones are projected first, so that they are not repeated for every tile of outputs. The adapter's gradients
are sums over splits of the rows, each in its own slot, added in order.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from ..._launch import (
    AotCase,
    blocks,
    current_arch,
    launch,
    meta,
    pow2,
    processors,
    record,
    stages_that_fit,
    unavailable,
)
from ..._operands import sum_partials
from .op import Needs
from .triton_kernels import lowrank_grad_kernel, lowrank_product_kernel, lowrank_project_kernel

MAX_RANK = 256  # the widest PAD
MAX_FUSED_RANK = 16  # at 32 the product's own loop takes 170 registers for 128 (sm_80) and 60 KiB for 54


class Kernel(Enum):
    """The kernels that have tiles of their own."""

    PRODUCT = "product"  # y, with narrow ranks summed in the same loop
    PROJECT = "projection to the rank"
    GRAD = "gradient of an adapter"


class ProductTile(NamedTuple):
    """Output rows and features of a program, input features of a step, warps and stages."""

    rows: int
    features: int
    step: int
    warps: int
    stages: int


# `product_tile` takes the one whose programs the multiprocessors finish first.
# Compiled by Triton 3.8 for sm_80 at rank 16: registers and bytes of spilled registers a thread, shared memory.
PRODUCT_TILES = (
    ProductTile(128, 128, 32, 8, 4),  # 128 registers, 54 KiB; 128 x 256 spills 56, 4 warps 48; a step of 64: 108 KiB
    ProductTile(128, 64, 32, 4, 4),  # 182 registers, 42 KiB
    ProductTile(64, 64, 32, 4, 4),
    ProductTile(32, 64, 64, 4, 4),
    ProductTile(32, 32, 64, 4, 4),
)
FLOAT32_TILE = ProductTile(32, 32, 32, 4, 1)  # float32 products run on plain arithmetic, with operands in registers


def launch_config(
    samples: int, rows: int, outs: int, rank: int, arch: int, kernel: Kernel, half: bool = True
) -> dict[str, int]:
    """The tiles of a kernel.

    Args:
        samples: how often the rows are shared out, 1 without an index.
        rows: of a sample.
        outs: output features of `Kernel.PRODUCT`.
        rank: of the adapter.
        arch: a tabled architecture, such as 86.
        kernel: which kernel.
        half: whether the operands have 16 bits.

    Returns:
        The kernel's constexprs, `num_warps` and `num_stages`.
    """
    pad = max(16, pow2(rank))
    if kernel is Kernel.PROJECT:
        # with a step of 64, rank 64 spills 8 bytes a thread on sm_86 and rank 128 takes 108 KiB of shared memory
        block_k = 64 if half and pad <= 32 else 32
        # x and a of one shape would be given one layout, 8 elements a thread: 32 bytes of a float32 adapter, by two
        # copies that each move whole sectors for half of them
        block_m = 64 if pad == 32 else 32
        stages = stages_that_fit(4, arch, lambda s: project_bound(pad, block_m, block_k, 2 if half else 4, s))
        return {"BLOCK_M": block_m, "BLOCK_K": block_k, "PAD": pad, "num_warps": 4, "num_stages": stages}
    if kernel is Kernel.GRAD:
        block_m, block_c = (32, 64) if half else (16, 32)
        if half and pad == 64:
            block_m = 64  # with 32 rows a step sm_100 spills 24 bytes a thread at rank 64
        # at rank 128 four warps take 168 registers a thread for 95, at rank 256 all 255
        warps = 4 if pad < 128 else 8
        return {"BLOCK_M": block_m, "BLOCK_C": block_c, "PAD": pad, "num_warps": warps, "num_stages": 2}
    tile = product_tile(samples, rows, outs, processors(arch)) if half else FLOAT32_TILE
    config = {"BLOCK_M": tile.rows, "BLOCK_N": tile.features, "BLOCK_K": tile.step}
    config |= {"PAD": pad, "BLOCK_R": min(pad, MAX_FUSED_RANK)}
    return config | {"num_warps": tile.warps, "num_stages": tile.stages}


def product_tile(samples: int, rows: int, outs: int, multiprocessors: int) -> ProductTile:
    """The tile whose busiest multiprocessor has least to do: its outputs, and what is loaded for them.

    With 160 tiles of 128 x 128 a card of 128 multiprocessors waits for 32 of them; 320 of half the size take three
    rounds, three quarters of the time.
    """

    def cost(tile: ProductTile) -> int:
        rounds = blocks(samples * blocks(rows, tile.rows) * blocks(outs, tile.features), multiprocessors)
        # 32 numbers of a row take a cycle from the cache, 64 bytes; an H100 adds to 64 outputs 32 products each in one
        return rounds * (tile.rows * tile.features + 64 * (tile.rows + tile.features))

    return min(PRODUCT_TILES, key=cost)


def split_features(features: int, step: int, programs: int, multiprocessors: int) -> tuple[int, int]:
    """Share the features of a projection out where its rows alone leave multiprocessors idle.

    Args:
        features: that are summed.
        step: features of a step of the kernel.
        programs: of one split.
        multiprocessors: of the card.

    Returns:
        The number of splits, and the features in each: two steps at least.
    """
    steps = max(2, blocks(blocks(features, step), max(1, multiprocessors // programs)))
    return blocks(features, steps * step), steps * step


def project_bound(pad: int, block_m: int, block_k: int, size: int, stages: int) -> int:
    """The most bytes of shared memory that `Kernel.PROJECT` takes: its loads ahead, or one step in x's dtype.

    Args:
        pad: PAD; an adapter's elements have up to 4 bytes.
        block_m: BLOCK_M.
        block_k: BLOCK_K.
        size: bytes of an element of x.
        stages: of its loads.
    """
    loads, operands = (stages - 1) * block_k * (4 * pad + block_m * size), block_k * (pad + block_m) * size
    # with 64 rows sm_90 keeps a step's operands beside the loads: 61,440 bytes at rank 32
    return loads + operands if block_m > 32 else max(loads, operands)


def reason(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, *_: object) -> str | None:
    why = unavailable(x, dots=True)
    if why is None and up.shape[-1] > MAX_RANK:
        why = f"rank {up.shape[-1]} is above {MAX_RANK}; merge the residual into the weight, or use the reference"
    return why


def _samples(x: Tensor, index: Tensor | None) -> Tensor:
    """[B, L, C]: the samples apart with index; else all rows together where that is a view."""
    if index is not None:
        return x.reshape(x.shape[0], -1, x.shape[-1])
    try:
        return x.view(1, -1, x.shape[-1])
    except RuntimeError:
        return x.reshape(x.shape[0], -1, x.shape[-1]) if x.dim() > 2 else x.reshape(1, -1, x.shape[-1])


def _dense_rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()


def _config(x: Tensor, outs: int, rank: int, kernel: Kernel) -> dict[str, int]:
    half = x.dtype != torch.float32
    return launch_config(x.shape[0], x.shape[1], outs, rank, current_arch(x.device), kernel, half)


def _project(
    x: Tensor,
    adapter: Tensor,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
    forward: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """mask scale x a, [B, L, PAD] in x's dtype or the one given: a is down^T in the forward, up in the backward."""
    samples, rows, ins = x.shape
    rank = adapter.shape[-2 if forward else -1]
    config = _config(x, 0, rank, Kernel.PROJECT)
    programs = blocks(rows, config["BLOCK_M"]) * samples
    splits, per_split = split_features(ins, config["BLOCK_K"], programs, processors(current_arch(x.device)))
    s = x.new_empty((samples, rows, config["PAD"]), dtype=dtype)
    part = s if splits == 1 else s.new_empty((splits, *s.shape), dtype=torch.float32)
    given = {"HAS_MASK": mask is not None, "HAS_INDEX": index is not None, "FORWARD": forward, "R": rank}
    given["EVEN"] = ins % config["BLOCK_K"] == 0
    tensors = x, adapter, x if mask is None else mask, x if index is None else index, part
    grid = blocks(rows, config["BLOCK_M"]), samples, splits
    launch(lowrank_project_kernel, grid, *tensors, rows, ins, per_split, float(scale), *x.stride(), **given, **config)
    return s if splits == 1 else sum_partials(part, s)


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: tuple[Tensor, Tensor],
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
    forward: bool,
    keep_s: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = x weight^T + bias + s b for x [B, L, K], and s = mask scale x a when kept.

    adapters: a and b: down and up in the forward, up and down in the backward.
    """
    samples, rows, ins = x.shape
    a, b = adapters
    outs, rank = weight.shape[0], a.shape[-2 if forward else -1]
    config = _config(x, outs, rank, Kernel.PRODUCT)
    fused = rank <= MAX_FUSED_RANK
    if fused:
        s = x.new_empty((samples, rows, config["PAD"]) if keep_s else 0)
    else:
        s = _project(x, a, mask, scale, index, forward)
    y = x.new_empty((samples, rows, outs))
    tiles_n = blocks(outs, config["BLOCK_N"])
    # a pointer must be some tensor even where the flags say that it is not read
    optional = (x if t is None else t for t in (mask, index))
    tensors = x, weight, x if bias is None else bias, a, b, *optional, s, y
    sizes = rows, outs, ins, tiles_n, float(scale)
    given = {"HAS_BIAS": bias is not None, "HAS_MASK": mask is not None, "HAS_INDEX": index is not None}
    how = {"FORWARD": forward, "READ_S": not fused, "SAVE_S": fused and keep_s, "R": rank}
    how["EVEN"] = ins % config["BLOCK_K"] == 0
    grid = blocks(rows, config["BLOCK_M"]) * tiles_n, samples
    launch(lowrank_product_kernel, grid, *tensors, *sizes, *x.stride(), *weight.stride(), **given, **how, **config)
    return y, s


def _adapter_grad(x: Tensor, s: Tensor, index: Tensor | None, like: Tensor, down: bool) -> Tensor:
    """s^T x [R, features] of `down`, x^T s [features, R] of `up`, of each sample, added up by concept."""
    samples, rows, features = x.shape
    rank = like.shape[-2 if down else -1]
    config = _config(x, 0, rank, Kernel.GRAD)
    columns = blocks(features, config["BLOCK_C"])
    # two programs a multiprocessor, so that one loads while the other multiplies
    wanted = max(1, blocks(2 * processors(current_arch(x.device)), columns * samples))
    per_split = config["BLOCK_M"] * blocks(blocks(rows, wanted), config["BLOCK_M"])
    splits = blocks(rows, per_split)
    part = x.new_empty((samples * splits, *like.shape[-2:]), dtype=torch.float32)
    sizes = rows, features, splits, per_split
    grid = (columns, samples * splits)
    launch(lowrank_grad_kernel, grid, x, s, part, *sizes, *x.stride(), FORWARD=down, R=rank, **config)
    return sum_partials(part, like.new_empty(like.shape), index)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
    pack: bool = True,
) -> Tensor:
    rows_mask, index = _dense_rows(mask), _dense_rows(index)
    bias = None if bias is None else bias.contiguous()
    adapters = down.contiguous(), up.contiguous()
    y, _ = _product(_samples(x, index), weight, bias, adapters, rows_mask, scale, index, forward=True)
    return y.view(*x.shape[:-1], weight.shape[0])


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
    needs: Needs,
    pack: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """t = dy up;  dx = dy W + mask scale t down;  ddown = (mask scale t)^T x;  dup = (mask scale dy)^T (x down^T)"""
    dx = dweight = dbias = ddown = dup = dmask = t = dy.new_empty(0)
    rows_mask, index, down, up = _dense_rows(mask), _dense_rows(index), down.contiguous(), up.contiguous()
    dy3 = _samples(dy, index)
    if needs.bias:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    if needs.x:
        how = rows_mask, scale, index, False
        dx, t = _product(dy3, weight.transpose(0, 1), None, (up, down), *how, keep_s=needs.down)
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    elif needs.down:
        t = _project(dy3, up, rows_mask, scale, index, forward=False)
    if x is None:
        return dx, dweight, dbias, ddown, dup, dmask
    x3 = _samples(x, index)
    if needs.weight:
        dweight = dy.reshape(-1, dy.shape[-1]).transpose(0, 1) @ x.reshape(-1, x.shape[-1])
    if needs.down:
        ddown = _adapter_grad(x3, t.view(*x3.shape[:2], -1), index, down, down=True)
    if needs.up:
        s = _project(x3, down, rows_mask, scale, index, forward=True)
        dup = _adapter_grad(dy3, s.view(*dy3.shape[:2], -1), index, up, down=False)
    if needs.mask and mask is not None:
        # where the mask is 0 the weighted projections above say nothing
        s = _project(x3, down, None, 1.0, index, forward=True, dtype=torch.float32)
        t = _project(dy3, up, None, 1.0, index, forward=False, dtype=torch.float32)
        dmask = ((s.view(t.shape) * t).sum(-1) * scale).to(mask.dtype).view(mask.shape)
    return dx, dweight, dbias, ddown, dup, dmask


def aot_cases(arch: int) -> list[AotCase]:
    """Attention projections with rank 5 % of the width and rank 4, the text's K/V, and a stack of concepts."""
    shapes = (
        ("SD1.5 64x64 r16", 1, 4096, 320, 320, 16, 0),
        ("SD1.5 8x8 r64", 1, 64, 1280, 1280, 64, 0),
        ("SD2.1 96x96 r4", 1, 9216, 320, 320, 4, 0),
        ("SD2.1 text K r4", 1, 77, 1024, 1280, 4, 0),
        ("SDXL 64x64 r32", 1, 4096, 640, 640, 32, 0),
        ("SDXL 32x32 r64", 1, 1024, 1280, 1280, 64, 0),
        ("SDXL 64x64 batch 8 r32", 8, 4096, 640, 640, 32, 0),
        ("SD1.5 64x64 stack r16", 4, 4096, 320, 320, 16, 3),
    )
    cases = []
    for label, batch, rows, ins, outs, rank, concepts in shapes:
        cases += _recorded(arch, f"{label} bf16", (batch, rows, ins, outs, rank, concepts), torch.bfloat16)
    return cases + _recorded(arch, "SD1.5 64x64 r16 fp16", (1, 4096, 320, 320, 16, 0), torch.float16)[:1]


def _recorded(arch: int, label: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[AotCase]:
    batch, rows, ins, outs, rank, concepts = shape
    stack = (concepts,) if concepts else ()
    x, dy, weight, bias = (
        meta(*s, dtype=dtype) for s in ((batch, rows, ins), (batch, rows, outs), (outs, ins), (outs,))
    )
    down, up = meta(*stack, rank, ins, dtype=torch.float32), meta(*stack, outs, rank, dtype=torch.float32)
    mask = meta(batch, rows, dtype=torch.float32)
    index = meta(batch, dtype=torch.int64) if concepts else None
    needs = Needs(True, False, False, True, True, mask=rank == 4)
    cases = record(arch, label, lambda: forward(x, weight, bias, down, up, mask, 1.0, index))
    return cases + record(arch, label, lambda: backward(dy, x, weight, down, up, mask, 1.0, index, needs))
