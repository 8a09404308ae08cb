"""Self-attention in Triton.

B batch, H heads, N queries, M keys, D head width (<= 256). The width is not padded to the next power of two: 40 is
computed as 32 + 16, 80 as 64 + 16, 160 as 128 + 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._launch import (
    MULTIPROCESSORS,
    AotCase,
    blocks,
    current_arch,
    launch,
    meta,
    record,
    split_width,
    unavailable,
)
from ..._layout import heads_last_empty, unit_rows
from ..._math import LOG2_E, common_align, head_reason, strides
from .triton_kernels import self_bwd_kv_kernel, self_bwd_q_kernel, self_fwd_kernel

# kernel -> (widest D, own tile, inner tile, warps, stages), the first row that is wide enough
TILES = {
    "forward": ((64, 128, 64, 4, 3), (96, 128, 32, 4, 3), (160, 32, 32, 4, 2), (256, 32, 32, 4, 1)),
    "bwd_q": ((64, 64, 64, 4, 2), (96, 64, 32, 4, 2), (160, 16, 32, 4, 2), (256, 16, 32, 4, 1)),
    "bwd_kv": ((64, 64, 32, 4, 2), (96, 64, 32, 4, 2), (160, 16, 32, 4, 2), (256, 16, 32, 4, 1)),
}
# the forward's tiles up to D = 64: products of whole warp groups leave the registers for wider ones
NARROW_FORWARD = {90: (128, 64), 100: (128, 64), 120: (64, 64)}


def launch_config(batch: int, heads: int, rows: int, width: int, arch: int, kernel: str, half: bool = True) -> dict:
    """Tiles of `kernel` ("forward", "bwd_q", "bwd_kv"); `rows` are what the programs share out."""
    d0, d1 = split_width(width)
    _, own, inner, warps, stages = next(row for row in TILES[kernel] if width <= row[0])
    if kernel == "forward" and width <= 64:
        own, inner = NARROW_FORWARD.get(arch, (128, 32))
    if not half:  # float32 products run on plain arithmetic, which holds its operands in registers
        own, inner, stages = 16, 16, 1
    while own > 16 and batch * heads * blocks(rows, own) < MULTIPROCESSORS[arch]:
        own //= 2
    tiles = {"BLOCK_M": own, "BLOCK_N": inner} if kernel == "bwd_kv" else {"BLOCK_N": own, "BLOCK_M": inner}
    return tiles | {"D": width, "D0": d0, "D1": d1, "num_warps": warps, "num_stages": stages}


def reason(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *_: object) -> str | None:
    return unavailable(q, dots=True) or head_reason(q, k, v)


def _config(q: Tensor, rows: int, kernel: str, align: int) -> dict:
    half = q.dtype != torch.float32
    config = launch_config(q.shape[0], q.shape[1], rows, q.shape[3], current_arch(q.device), kernel, half)
    return config | {"ALIGN": align}


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    align = common_align(q, k, v)
    config = _config(q, queries, "forward", align)
    tiles = blocks(queries, config["BLOCK_N"])
    out = heads_last_empty(q)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    launch(
        self_fwd_kernel, (batch * heads * tiles,), q, k, v, out, lse, queries, keys, heads, tiles, scale * LOG2_E,
        *strides(q, align), *strides(k, align), *strides(v, align), EVEN=keys % config["BLOCK_M"] == 0, **config,
    )  # fmt: skip
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
    config = _config(q, queries, "bwd_q", align)
    tiles = blocks(queries, config["BLOCK_N"])
    launch(
        self_bwd_q_kernel, (batch * heads * tiles,), q, k, v, dout, out, lse, delta, dq,
        queries, keys, heads, tiles, float(scale), scale * LOG2_E, *layout, *strides(out, align),
        EVEN=keys % config["BLOCK_M"] == 0, **config,
    )  # fmt: skip
    config = _config(q, keys, "bwd_kv", align)
    tiles = blocks(keys, config["BLOCK_M"])
    launch(
        self_bwd_kv_kernel, (batch * heads * tiles,), q, k, v, dout, lse, delta, dk, dv,
        queries, keys, heads, tiles, float(scale), scale * LOG2_E, *layout, **config,
    )  # fmt: skip
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
