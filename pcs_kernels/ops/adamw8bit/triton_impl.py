"""AdamW with 8-bit states in Triton: one pass, 10 bytes a half-precision parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._launch import AotCase, blocks, launch, meta, pow2, record, unavailable
from . import reference
from .codes import is_dynamic, search_tables
from .row import WIDTH
from .triton_kernels import adamw8bit_kernel, adamw32bit_kernel

TILE = 1024  # elements of a program, 8 a thread: 16-bit parameters move in 16-byte loads and stores


def launch_config(block_size: int) -> dict[str, int]:
    """A tile of TILE elements, or one block of the states where that is larger: then with a warp for 256 elements."""
    columns = pow2(block_size)
    rows, warps = max(1, TILE // columns), max(4, min(columns // 256, 16))
    return {"BLOCK_SIZE": block_size, "COLS": columns, "ROWS": rows, "num_warps": warps, "num_stages": 1}


def reason(param: Tensor, grad: Tensor) -> str | None:
    return unavailable(param, dots=False)


def step_8bit(
    param: Tensor,
    grad: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    qmap1: Tensor,
    qmap2: Tensor,
    row: Tensor,
    finite: Tensor | None,
    block_size: int,
    stochastic: bool,
) -> None:
    if not (is_dynamic(qmap1, True) and is_dynamic(qmap2, False)):
        # another code than the dynamic map is a table, not a formula: the reference looks it up
        tensors = param, grad, state1, state2, absmax1, absmax2, qmap1, qmap2
        reference.step_8bit(*tensors, row, finite, block_size, stochastic)
        return
    config = launch_config(block_size)
    n = param.numel()
    (bounds1, first1), (bounds2, first2) = (search_tables(signed, qmap1.device) for signed in (True, False))
    launch(
        adamw8bit_kernel,
        (blocks(n, config["ROWS"] * block_size),),
        param,
        grad.contiguous(),
        state1,
        state2,
        absmax1,
        absmax2,
        row,
        None if finite is None else finite.view(torch.uint8),
        qmap1,
        qmap2,
        bounds1,
        bounds2,
        first1,
        first2,
        n,
        STOCHASTIC=stochastic and param.dtype != torch.float32,
        **config,
    )


def step_32bit(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row: Tensor,
    finite: Tensor | None,
    stochastic: bool,
) -> None:
    n = param.numel()
    launch(
        adamw32bit_kernel,
        (blocks(n, TILE),),
        param,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        row,
        None if finite is None else finite.view(torch.uint8),
        n,
        BLOCK=TILE,
        STOCHASTIC=stochastic and param.dtype != torch.float32,
        num_warps=4,
        num_stages=1,
    )


def aot_cases(arch: int) -> list[AotCase]:
    """The widest convolution weight of SD1.5 and SDXL's feed-forward, and a bias."""
    cases = []
    for label, n in (("SD1.5 2560x1280x9", 2560 * 1280 * 9), ("SDXL 1280x10240", 1280 * 10240)):
        for name, dtype in ((f"{label} bf16", torch.bfloat16), (f"{label} fp16", torch.float16)):
            cases += record(arch, name, lambda n=n, dtype=dtype: _step_of(n, dtype))
    p, m = meta(1280), meta(1280, dtype=torch.float32)
    return cases + record(arch, "bias 1280 bf16", lambda: step_32bit(p, p, m, m, _row(), None, True))


def _row() -> Tensor:
    """Not zeros, where the tables are run with real tensors: those would refuse the step."""
    return meta(WIDTH, dtype=torch.float32) + 1


def _step_of(n: int, dtype: torch.dtype) -> None:
    p, state, absmax = meta(n, dtype=dtype), meta(n, dtype=torch.uint8), meta(blocks(n, 256), dtype=torch.float32)
    qmap = meta(256, dtype=torch.float32)
    step_8bit(p, p, state, state, absmax, absmax, qmap, qmap, _row(), None, 256, True)
