"""adamw8bit on the CPU: csrc/adamw8bit.cpp."""

from __future__ import annotations

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
    row: Tensor,
    finite: Tensor | None,
    block_size: int,
    stochastic: bool,
) -> None:
    if not (_is_known(qmap1, True) and _is_known(qmap2, False)):
        # Another code than the dynamic map is a table, not a formula: the reference looks it up.
        tensors = param, grad, state1, state2, absmax1, absmax2, qmap1, qmap2
        reference.step_8bit(*tensors, row, finite, block_size, stochastic)
        return
    grad = grad.contiguous()
    LIBRARY.adamw8bit_step(
        _native.dtype_code(param),
        _native.dtype_code(grad),
        *map(_native.address, (param, grad, state1, state2, absmax1, absmax2)),
        param.numel(),
        (_native.address(row), _native.address(finite), block_size, stochastic),
        _native.threads(),
    )


def _is_known(qmap: Tensor, signed: bool) -> bool:
    return qmap is code_map(signed) or LIBRARY.adamw8bit_knows(_native.address(qmap), signed)


def step_32bit(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row: Tensor,
    finite: Tensor | None,
    stochastic: bool,
) -> None:
    grad = grad.contiguous()
    LIBRARY.adamw32bit_step(
        _native.dtype_code(param),
        _native.dtype_code(grad),
        *map(_native.address, (param, grad, exp_avg, exp_avg_sq)),
        param.numel(),
        (_native.address(row), _native.address(finite), 0, stochastic),
        _native.threads(),
    )
