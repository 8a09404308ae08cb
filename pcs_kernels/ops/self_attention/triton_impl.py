"""Self-attention in Triton.

B batch, H heads, N queries, M keys, D head width (<= 256). The width is not padded to the next power of two: 40 is
computed as 32 + 16, 80 as 64 + 16, 160 as 128 + 32.
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
    processors,
    record,
    split_width,
    unavailable,
    unavailable_for,
)
from ..._layout import heads_last_empty, unit_rows
from ..._operands import LOG2_E, common_align, head_reason, strides, width_reason
from . import in_parts
from .triton_kernels import self_bwd_kv_kernel, self_bwd_q_kernel, self_fwd_kernel

INSTEAD = in_parts  # what does a call whose kernel fails: the reference's scores may not fit


class Kernel(Enum):
    """The kernels that have tiles of their own."""

    FORWARD = "forward"
    BACKWARD_Q = "gradient of the queries"
    BACKWARD_KV = "gradients of keys and values"


class Tile(NamedTuple):
    """The tiles of heads up to `widest` on some architectures (on all, where none is named)."""

    widest: int
    archs: tuple[int, ...]
    own: int  # queries (or keys) of a program
    inner: int  # keys (or queries) of one step of its loop
    warps: int
    stages: int


# The first row that fits is taken. A row's reason is what the next larger tile costs, compiled by Triton 3.8 (registers
# and bytes of spilled registers a thread, as in tests/triton_budget.json).
TILES = {
    Kernel.FORWARD: (
        Tile(64, (90, 100), 128, 64, 4, 3),  # 230 registers at D = 64; 128 x 128 spills 56 at D = 40
        Tile(64, (120,), 64, 64, 4, 3),  # 145 registers; 128 x 32 spills 8 at D = 40, 128 x 64 spills 72 at D = 64
        Tile(64, (), 128, 32, 4, 3),  # 244 registers at D = 64; 128 x 64 spills 8 on sm_86
        Tile(96, (), 128, 32, 4, 3),  # 255 registers at D = 80, sm_120 spills 16; 128 x 64: 16 on sm_80, 56 on sm_120
        Tile(160, (), 32, 32, 4, 2),  # 255 registers on sm_80; 64 x 32 spills 32 on sm_120
        Tile(256, (), 32, 32, 4, 1),  # 198 registers; 64 x 32 spills 40 on sm_80; a second stage: 51 KiB for 35
    ),
    Kernel.BACKWARD_Q: (
        Tile(64, (), 64, 64, 4, 2),  # 186 registers at D = 64; 128 x 32 spills 16, 64 x 128 spills 32 on sm_80
        Tile(96, (), 64, 32, 4, 2),  # 178 registers at D = 80; 64 x 64 takes all 255, 128 x 32 spills 16 on sm_120
        Tile(160, (), 16, 32, 4, 2),  # 126 registers; 32 x 32 spills 16 on sm_120
        Tile(256, (), 16, 32, 4, 1),  # 166 registers, 48 KiB
    ),
    Kernel.BACKWARD_KV: (
        Tile(64, (), 64, 32, 4, 2),  # 182 registers at D = 64; 64 x 64 and 128 x 32 spill 16 on sm_80
        Tile(96, (), 64, 32, 4, 2),  # 255 registers at D = 80, sm_120 spills 24; 64 x 64: 24 on sm_80, 104 on sm_120
        Tile(160, (), 16, 32, 4, 2),  # 168 registers; 32 x 32 spills 80 on sm_80 and 152 on sm_120
        Tile(256, (), 16, 32, 4, 1),  # 202 registers; 32 x 32 spills 8 on sm_80 and 40 on sm_120
    ),
}


def launch_config(
    batch: int, heads: int, rows: int, width: int, arch: int, kernel: Kernel, half: bool = True
) -> dict[str, int]:
    """The tiles of a kernel, smaller where few rows would leave multiprocessors idle.

    Args:
        batch: B of the call.
        heads: H.
        rows: queries, or keys for `Kernel.BACKWARD_KV`: what the programs of one head share.
        width: of a head.
        arch: a tabled architecture, such as 86.
        kernel: which kernel.
        half: whether the operands have 16 bits.

    Returns:
        The kernel's constexprs, `num_warps` and `num_stages`.
    """
    d0, d1 = split_width(width)
    tile = next(t for t in TILES[kernel] if width <= t.widest and (not t.archs or arch in t.archs))
    own, inner, stages = tile.own, tile.inner, tile.stages
    if not half:  # float32 products run on plain arithmetic, which holds its operands in registers
        own, inner, stages = 16, 16, 1
    while own > 16 and batch * heads * blocks(rows, own) < processors(arch):
        own //= 2
    tiles = {"BLOCK_M": own, "BLOCK_N": inner} if kernel is Kernel.BACKWARD_KV else {"BLOCK_N": own, "BLOCK_M": inner}
    return tiles | {"D": width, "D0": d0, "D1": d1, "num_warps": tile.warps, "num_stages": stages}


def reason(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *_: object) -> str | None:
    return unavailable(q, dots=True) or head_reason(q, k, v)


def reason_for(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why heads of this width and dtype cannot run on a device, however they lie in memory; or None."""
    return unavailable_for(device, dtype, dots=True) or width_reason(width)


def _config(q: Tensor, rows: int, kernel: Kernel, align: int) -> dict[str, int]:
    half = q.dtype != torch.float32
    config = launch_config(q.shape[0], q.shape[1], rows, q.shape[3], current_arch(q.device), kernel, half)
    return config | {"ALIGN": align}


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    align = common_align(q, k, v)
    config = _config(q, queries, Kernel.FORWARD, align)
    tiles = blocks(queries, config["BLOCK_N"])
    out = heads_last_empty(q)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    sizes = queries, keys, heads, tiles, scale * LOG2_E
    layout = *strides(q, align), *strides(k, align), *strides(v, align)
    even = keys % config["BLOCK_M"] == 0
    launch(self_fwd_kernel, (batch * heads * tiles,), q, k, v, out, lse, *sizes, *layout, EVEN=even, **config)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (unit_rows(t) for t in (dout, q, k, v, out))
    lse = lse.contiguous()
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    align = common_align(q, k, v, dout, out)
    layout = *strides(q, align), *strides(k, align), *strides(v, align), *strides(dout, align)
    dq, dk, dv = (heads_last_empty(t) for t in (q, k, v))
    delta = torch.empty_like(lse)
    config = _config(q, queries, Kernel.BACKWARD_Q, align)
    tiles = blocks(queries, config["BLOCK_N"])
    sizes = queries, keys, heads, tiles, float(scale), scale * LOG2_E
    tensors = q, k, v, dout, out, lse, delta, dq
    even = keys % config["BLOCK_M"] == 0
    wide = *layout, *strides(out, align)
    launch(self_bwd_q_kernel, (batch * heads * tiles,), *tensors, *sizes, *wide, EVEN=even, **config)
    config = _config(q, keys, Kernel.BACKWARD_KV, align)
    tiles = blocks(keys, config["BLOCK_M"])
    sizes = queries, keys, heads, tiles, float(scale), scale * LOG2_E
    tensors = q, k, v, dout, lse, delta, dk, dv
    launch(self_bwd_kv_kernel, (batch * heads * tiles,), *tensors, *sizes, *layout, **config)
    return dq, dk, dv


def aot_cases(arch: int) -> list[AotCase]:
    """Every attention resolution of the three models; q, k and v as a projection leaves them."""
    shapes = (
        ("SD1.5 64x64", 8, 4096, 40),
        ("SD1.5 32x32", 8, 1024, 80),
        ("SD1.5 16x16", 8, 256, 160),
        ("SD1.5 8x8", 8, 64, 160),
        ("SD2.1 96x96", 5, 9216, 64),
        ("SD2.1 12x12", 20, 144, 64),
        ("SDXL 64x64", 10, 4096, 64),
        ("SDXL 32x32", 20, 1024, 64),
        ("SD1.5 16x16 batch 16", 128, 256, 160),
    )
    cases = []
    for label, heads, n, d in shapes:
        q = meta(1, n, heads, d).transpose(1, 2)
        lse = meta(1, heads, n, dtype=torch.float32)
        name = f"{label} bf16"
        cases += record(arch, name, lambda q=q: forward(q, q, q, 0.1))
        cases += record(arch, name, lambda q=q, lse=lse: backward(q, q, q, q, q, lse, 0.1))
    half = meta(1, 4096, 8, 40, dtype=torch.float16).transpose(1, 2)
    return cases + record(arch, "SD1.5 64x64 fp16", lambda: forward(half, half, half, 0.1))
