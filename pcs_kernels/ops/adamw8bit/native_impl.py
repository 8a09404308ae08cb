"""adamw8bit on the CPU: csrc/adamw8bit.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from . import reference
from .codes import code_map

LIBRARY = _native.library()


def reason(param: Tensor, grad: Tensor) -> str | None:
    return _native.reason(param, grad)


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
    numbers = (lr, beta1, beta2, eps, weight_decay, step, block_size, grad_scale, seed, decay_first)
    if not (_is_known(qmap1, True) and _is_known(qmap2, False)):
        # Another code than the dynamic map is a table, not a formula: the reference looks it up.
        reference.step_8bit(param, grad, state1, state2, absmax1, absmax2, qmap1, qmap2, *numbers)
        return
    grad = grad.contiguous()
    LIBRARY.adamw8bit_step(
        _native.dtype_code(param),
        _native.dtype_code(grad),
        *map(_native.address, (param, grad, state1, state2, absmax1, absmax2)),
        param.numel(),
        _settings(param, *numbers),
        _native.threads(),
    )


def _is_known(qmap: Tensor, signed: bool) -> bool:
    return qmap is code_map(signed) or LIBRARY.adamw8bit_knows(_native.address(qmap), signed)


def _settings(
    param: Tensor,
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
) -> tuple[float | None, ...]:
    """The numbers as csrc takes them: the seed in 32 bits, and none where nothing is rounded."""
    seed = None if seed is None or param.dtype != torch.bfloat16 else seed & 0xFFFFFFFF
    return (lr, beta1, beta2, eps, weight_decay, step, block_size, grad_scale, seed, decay_first)


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
    grad = grad.contiguous()
    settings = _settings(param, lr, beta1, beta2, eps, weight_decay, step, 0, grad_scale, seed, decay_first)
    LIBRARY.adamw32bit_step(
        _native.dtype_code(param),
        _native.dtype_code(grad),
        *map(_native.address, (param, grad, exp_avg, exp_avg_sq)),
        param.numel(),
        settings,
        _native.threads(),
    )
