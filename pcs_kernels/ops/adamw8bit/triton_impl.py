"""AdamW with 8-bit states in Triton: one pass, 10 bytes a half-precision parameter."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..._launch import AotCase, blocks, launch, meta, pow2, record, unavailable
from . import reference
from .codes import code_map
from .triton_kernels import adamw8bit_kernel, adamw32bit_kernel

MASK32 = 0xFFFFFFFF
TILE = 1024  # elements of a program, 8 a thread: 16-bit parameters move in 16-byte loads and stores
_known_maps = WeakIdKeyDictionary()


def launch_config(block_size: int) -> dict[str, int]:
    """A tile of TILE elements, or one block of the states where that is larger: then with a warp for 256 elements."""
    columns = pow2(block_size)
    rows, warps = max(1, TILE // columns), max(4, min(columns // 256, 16))
    return {"BLOCK_SIZE": block_size, "COLS": columns, "ROWS": rows, "num_warps": warps, "num_stages": 1}


def reason(param: Tensor, grad: Tensor) -> str | None:
    return unavailable(param, dots=False)


def _is_dynamic(qmap: Tensor, signed: bool) -> bool:
    """Whether qmap is the dynamic map; asked of the device once a tensor."""
    if qmap.device.type == "meta":
        return True
    known = _known_maps.get(qmap)
    if known is None:
        known = torch.equal(qmap.cpu(), code_map(signed))
        _known_maps[qmap] = known
    return known


def _hash32(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def _key(seed: int | None, step: int) -> int:
    """The hash of seed and step as a signed 32-bit integer."""
    key = _hash32(_hash32((seed or 0) & MASK32) ^ (step & MASK32))
    return key - 2**32 if key >= 2**31 else key


def _numbers(
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    decay_first: bool,
) -> tuple[float, ...]:
    """beta1, beta2, 1 - beta1, 1 - beta2, step size, corrected eps, decay before and after, gradient scale."""
    correction2 = math.sqrt(1 - beta2**step)
    size = lr * correction2 / (1 - beta1**step)
    decay = 1 - lr * weight_decay
    before, after = (decay, 1.0) if decay_first else (1.0, decay)
    numbers = beta1, beta2, 1 - beta1, 1 - beta2, size, eps * correction2, before, after, grad_scale
    return tuple(float(number) for number in numbers)


def step_8bit(
    param: Tensor,
    grad: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    qmap1: Tensor,
    qmap2: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    block_size: int,
    grad_scale: float,
    seed: int | None,
    decay_first: bool,
) -> None:
    if not (_is_dynamic(qmap1, True) and _is_dynamic(qmap2, False)):
        # another code than the dynamic map is a table, not a formula: the reference looks it up
        numbers = lr, beta1, beta2, eps, weight_decay, step, block_size, grad_scale, seed, decay_first
        reference.step_8bit(param, grad, state1, state2, absmax1, absmax2, qmap1, qmap2, *numbers)
        return
    config = launch_config(block_size)
    n = param.numel()
    count = blocks(n, block_size)
    launch(
        adamw8bit_kernel,
        (blocks(count, config["ROWS"]),),
        param,
        grad.contiguous(),
        state1,
        state2,
        absmax1,
        absmax2,
        n,
        count,
        _key(seed, step),
        *_numbers(lr, beta1, beta2, eps, weight_decay, step, grad_scale, decay_first),
        STOCHASTIC=seed is not None and param.dtype != torch.float32,
        **config,
    )


def step_32bit(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    seed: int | None,
    decay_first: bool,
) -> None:
    n = param.numel()
    launch(
        adamw32bit_kernel,
        (blocks(n, TILE),),
        param,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        n,
        _key(seed, step),
        *_numbers(lr, beta1, beta2, eps, weight_decay, step, grad_scale, decay_first),
        BLOCK=TILE,
        STOCHASTIC=seed is not None and param.dtype != torch.float32,
        num_warps=4,
        num_stages=1,
    )


def aot_cases(arch: int) -> list[AotCase]:
    """The widest convolution weight of SD1.5 and SDXL's feed-forward, and a bias."""
    cases = []
    for label, n in (("SD1.5 2560x1280x9", 2560 * 1280 * 9), ("SDXL 1280x10240", 1280 * 10240)):
        for name, dtype, seed in ((f"{label} bf16", torch.bfloat16, 1), (f"{label} fp16", torch.float16, 1)):
            cases += record(arch, name, lambda n=n, dtype=dtype, seed=seed: _step_of(n, dtype, seed))
    p, m = meta(1280), meta(1280, dtype=torch.float32)
    numbers = 1e-3, 0.9, 0.999, 1e-8, 0.01, 7, 1.0, 1, False
    return cases + record(arch, "bias 1280 bf16", lambda: step_32bit(p, p, m, m, *numbers))


def _step_of(n: int, dtype: torch.dtype, seed: int | None) -> None:
    p, state, absmax = meta(n, dtype=dtype), meta(n, dtype=torch.uint8), meta(blocks(n, 256), dtype=torch.float32)
    numbers = 1e-3, 0.9, 0.999, 1e-8, 0.01, 7, 256, 1.0, seed, False
    step_8bit(p, p, state, state, absmax, absmax, absmax, absmax, *numbers)
