"""GEGLU in Triton: element-wise, one pass over x; the backward writes both halves of dx in one pass.

M rows, F output features: x [M, 2F], y [M, F].
"""

from __future__ import annotations

from torch import Tensor

from ..._launch import AotCase, blocks, launch, meta, record, unavailable
from .triton_kernels import geglu_bwd_kernel, geglu_fwd_kernel

# 4 x 256 outputs, 8 a thread: in 16 bits, each half of x is one 16-byte load
CONFIG = {"BLOCK_M": 4, "BLOCK_F": 256, "num_warps": 4, "num_stages": 1}


def reason(x: Tensor) -> str | None:
    return unavailable(x, dots=False)


def _grid(rows: int, features: int) -> tuple[int, int]:
    return blocks(rows, CONFIG["BLOCK_M"]), blocks(features, CONFIG["BLOCK_F"])


def forward(x: Tensor) -> Tensor:
    x2 = x.reshape(-1, x.shape[-1])
    rows, features = x2.shape[0], x2.shape[1] // 2
    y = x.new_empty((*x.shape[:-1], features))
    launch(geglu_fwd_kernel, _grid(rows, features), x2, y, rows, features, *x2.stride(), **CONFIG)
    return y


def backward(dy: Tensor, x: Tensor) -> Tensor:
    x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    rows, features = dy2.shape
    dx = x.new_empty(x.shape)
    layout = *dy2.stride(), *x2.stride()
    launch(geglu_bwd_kernel, _grid(rows, features), dy2, x2, dx, rows, features, *layout, **CONFIG)
    return dx


def aot_cases(arch: int) -> list[AotCase]:
    cases = []
    for label, rows, features in (("SD1.5", 4096, 1280), ("SD2.1", 9216, 1280), ("SDXL", 4096, 2560)):
        x, dy = meta(1, rows, 2 * features), meta(1, rows, features)
        cases += record(arch, f"{label} bf16", lambda x=x: forward(x))
        cases += record(arch, f"{label} bf16", lambda x=x, dy=dy: backward(dy, x))
    half = meta(1, 4096, 2560).half()
    return cases + record(arch, "SD1.5 fp16", lambda: forward(half))
