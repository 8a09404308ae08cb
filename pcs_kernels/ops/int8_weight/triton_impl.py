"""8-bit weights in Triton: a weight is expanded in one pass; quantizing happens once, and is torch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._launch import AotCase, blocks, launch, meta, record, unavailable
from ..._layout import weight_format
from .reference import BLOCK
from .reference import quantize as quantize
from .triton_kernels import int8_expand_kernel

# 16 blocks of 64 codes, 8 a thread: one load of 8 bytes and one store of 16. With more, loads of 16 codes would have to
# be handed to other threads for such stores.
CONFIG = {"BLOCKS": 16, "num_warps": 4, "num_stages": 1}


def reason(x: Tensor) -> str | None:
    return unavailable(x, dots=False)


def expand(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    weight = torch.empty_like(codes, dtype=dtype, memory_format=weight_format(codes))
    scales = scales.contiguous()
    inputs, total = codes[0].numel(), scales.numel()
    kind = {"WHOLE": inputs % BLOCK == 0, "WIDTH": BLOCK}
    grid = (blocks(total, CONFIG["BLOCKS"]),)
    launch(int8_expand_kernel, grid, codes, scales, weight, total, inputs, scales.shape[1], **kind, **CONFIG)
    return weight


def aot_cases(arch: int) -> list[AotCase]:
    """A wide convolution, a feed-forward's product, and inputs that are no multiple of a block."""
    cases = []
    for label, shape, dtype in (
        ("SD1.5 conv 1280 bf16", (1280, 1280, 3, 3), torch.bfloat16),
        ("SDXL linear 10240 bf16", (10240, 1280), torch.bfloat16),
        ("SD1.5 linear fp16", (2560, 320), torch.float16),
        ("16 inputs bf16", (320, 16), torch.bfloat16),
    ):
        codes = meta(*shape, dtype=torch.int8)
        codes = codes.contiguous(memory_format=weight_format(codes))
        scales = meta(shape[0], blocks(codes[0].numel(), BLOCK), dtype=torch.int16)
        cases += record(arch, label, lambda c=codes, s=scales, d=dtype: expand(c, s, d))
    return cases
