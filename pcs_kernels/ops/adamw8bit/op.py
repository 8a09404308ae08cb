"""adamw8bit: one AdamW step of one parameter, in place, with states of 8 bits (or 32 for small tensors).

param and grad of any shape, n elements; state1 (m, signed codes) and state2 (v, unsigned codes) uint8 of n elements;
absmax1, absmax2 float32 [ceil(n / block_size)]; qmap1, qmap2 float32 [256]; the numbers of the step are a row on the
same device (row.py), so that no step waits for the host and a CUDA graph replays with other numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ... import _check as check
from ..._dispatch import Op, define, forced_backend
from .codes import blocks, device_map
from .row import WIDTH, host_row

OP = Op("adamw8bit", __package__)


def _check_param(param: Tensor, grad: Tensor) -> None:
    check.floating("param", param)
    check.not_empty("param", param)
    check.dtype_in("param", param, (torch.float32, torch.float16, torch.bfloat16))
    check.require(param.is_contiguous(), lambda: "param must be contiguous. Fix: param.data = param.data.contiguous()")
    check.floating("grad", grad)
    check.shape("grad", grad, tuple(param.shape), "param.shape")
    check.dtype_in("grad", grad, (param.dtype, torch.float32))
    check.same_device("grad", grad, "param", param)


def _check_numbers(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, grad_scale: float
) -> None:
    numbers = dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, grad_scale=grad_scale)
    for name, value in numbers.items():
        check.finite(name, check.number(name, value))
    for name in ("lr", "eps", "weight_decay"):
        value = numbers[name]
        check.require(value >= 0, lambda: f"{name} must not be negative: {value}")
    for name in ("beta1", "beta2"):
        value = numbers[name]
        check.require(0 <= value < 1, lambda: f"{name} must be in [0, 1), not {value}")
    check.require_type(isinstance(step, int), lambda: f"step must be an integer, not {type(step).__name__}")
    check.require(step >= 1, lambda: f"step counts from 1, not {step}")


def _check_row(row: Tensor, finite: Tensor | None, param: Tensor) -> None:
    """The row and the flag that the step reads from the device."""
    check.tensor("row", row)
    check.dtype_in("row", row, (torch.float32,))
    check.shape("row", row, (WIDTH,), "[numbers]")
    check.require(row.is_contiguous(), lambda: "row must be contiguous")
    check.same_device("row", row, "param", param)
    if finite is not None:
        check.dtype_in("finite", finite, (torch.bool,))
        check.require(finite.numel() == 1, lambda: f"finite must have one element, not {tuple(finite.shape)}")
        check.same_device("finite", finite, "param", param)


def _check_state(name: str, state: Tensor, shape: tuple[int, ...], dtype: torch.dtype, param: Tensor) -> None:
    check.tensor(name, state)
    check.dtype_in(name, state, (dtype,))
    check.dense(name, state)
    check.shape(name, state, shape, "[elements]")
    check.same_device(name, state, "param", param)
    check.require(state.is_contiguous(), lambda: f"{name} must be contiguous")


def _check_apart(**tensors: Tensor) -> None:
    """What the step writes must not share memory with anything else it touches."""
    taken: dict[int, str] = {}
    for name, t in tensors.items():
        pointer = t.data_ptr()
        check.require(pointer not in taken, lambda: f"{name} and {taken[pointer]} are the same memory")
        taken[pointer] = name


def _check_8bit(
    param: Tensor,
    grad: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    qmap1: Tensor,
    qmap2: Tensor,
    block_size: int,
) -> None:
    _check_param(param, grad)
    check.require(
        16 <= block_size <= 4096 and block_size & (block_size - 1) == 0,
        lambda: f"block_size must be a power of two from 16 to 4096, not {block_size}",
    )
    count = (blocks(param.numel(), block_size),)
    for name, state in (("state1", state1), ("state2", state2)):
        _check_state(name, state, tuple(param.shape), torch.uint8, param)
    for name, state in (("absmax1", absmax1), ("absmax2", absmax2)):
        _check_state(name, state, count, torch.float32, param)
    for name, state in (("qmap1", qmap1), ("qmap2", qmap2)):
        _check_state(name, state, (256,), torch.float32, param)


def check_step(param: Tensor, grad: Tensor, states: tuple[Tensor, ...], block_size: int | None) -> None:
    """What the single ops check of their tensors, but for the code maps; no block_size means float32 states."""
    if block_size is None:
        _check_32bit(param, grad, *states)
        names = ("exp_avg", "exp_avg_sq")
    else:
        maps = (device_map(signed, param.device) for signed in (True, False))
        _check_8bit(param, grad, *states, *maps, block_size)
        names = ("state1", "state2", "absmax1", "absmax2")
    _check_apart(param=param, grad=grad, **dict(zip(names, states, strict=True)))


def written(*tensors: Tensor) -> None:
    """Tell autograd, and the packed copies of weights, that the kernel has written to these."""
    increment_version(t for t in tensors if not t.is_inference())


def _step_8bit(
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
    backend: str,
) -> None:
    _check_8bit(param, grad, state1, state2, absmax1, absmax2, qmap1, qmap2, block_size)
    _check_row(row, finite, param)
    _check_apart(param=param, grad=grad, state1=state1, state2=state2, absmax1=absmax1, absmax2=absmax2)
    implementation = OP.select(backend, param.device.type, param, grad)
    coded = state1, state2, absmax1, absmax2, qmap1, qmap2
    implementation.step_8bit(param, grad, *coded, row, finite, block_size, stochastic)
    written(param, state1, state2, absmax1, absmax2, row)


def _step_8bit_fake(
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
    backend: str,
) -> None:
    _check_8bit(param, grad, state1, state2, absmax1, absmax2, qmap1, qmap2, block_size)
    _check_row(row, finite, param)


def _check_32bit(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    _check_param(param, grad)
    for name, state in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_state(name, state, tuple(param.shape), torch.float32, param)


def _step_32bit(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row: Tensor,
    finite: Tensor | None,
    stochastic: bool,
    backend: str,
) -> None:
    _check_32bit(param, grad, exp_avg, exp_avg_sq)
    _check_row(row, finite, param)
    _check_apart(param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    implementation = OP.select(backend, param.device.type, param, grad)
    implementation.step_32bit(param, grad, exp_avg, exp_avg_sq, row, finite, stochastic)
    written(param, exp_avg, exp_avg_sq, row)


def _step_32bit_fake(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row: Tensor,
    finite: Tensor | None,
    stochastic: bool,
    backend: str,
) -> None:
    _check_32bit(param, grad, exp_avg, exp_avg_sq)
    _check_row(row, finite, param)


define(
    "adamw8bit_step(Tensor(a!) param, Tensor grad, Tensor(b!) state1, Tensor(c!) state2, Tensor(d!) absmax1,"
    " Tensor(e!) absmax2, Tensor qmap1, Tensor qmap2, Tensor(f!) row, Tensor? finite, int block_size,"
    " bool stochastic, str backend) -> ()",
    _step_8bit,
    _step_8bit_fake,
)
define(
    "adamw32bit_step(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) row,"
    " Tensor? finite, bool stochastic, str backend) -> ()",
    _step_32bit,
    _step_32bit_fake,
)


def _row(numbers: tuple[float | None, ...], device: torch.device) -> tuple[Tensor, bool]:
    """(the row of numbers given by the host, whether 16 bits are rounded stochastically)."""
    lr, beta1, beta2, eps, weight_decay, step, grad_scale, seed, decay_first = numbers
    _check_numbers(lr, beta1, beta2, eps, weight_decay, step, grad_scale)  # type: ignore[arg-type]
    check.require_type(
        seed is None or isinstance(seed, int), lambda: f"seed must be an integer or None, not {type(seed).__name__}"
    )
    check.require_type(
        isinstance(decay_first, (bool, int)), lambda: f"decay_first must be a bool, not {type(decay_first).__name__}"
    )
    return host_row(*numbers).to(device), seed is not None  # type: ignore[arg-type]


def step_8bit(
    param: Tensor,
    grad: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    qmap1: Tensor,
    qmap2: Tensor,
    *settings: float | None,
) -> None:
    """One AdamW step of `param` in place, with states coded in 8 bits.

    Args:
        param: n elements of any shape, contiguous; 16 bits are rounded stochastically where a seed is given.
        grad: of param's shape, in its dtype or float32.
        state1: uint8 codes of m, of param's shape.
        state2: uint8 codes of v, of param's shape.
        absmax1: float32 [ceil(n / block_size)], the scale of each block of state1.
        absmax2: the same of state2.
        qmap1: float32 [256], the signed code map.
        qmap2: float32 [256], the unsigned code map.
        *settings: lr, beta1, beta2, eps, weight_decay, step (from 1), block_size, grad_scale, seed or None,
            decay_first (whether the weight decay comes before the update).
    """
    check.tensor("param", param)
    *numbers, block_size, grad_scale, seed, decay_first = settings
    check.require_type(
        isinstance(block_size, int), lambda: f"block_size must be an integer, not {type(block_size).__name__}"
    )
    row, stochastic = _row((*numbers, grad_scale, seed, decay_first), param.device)
    torch.ops.pcs_kernels.adamw8bit_step(
        param, grad, state1, state2, absmax1, absmax2, qmap1, qmap2, row, None, block_size, stochastic, forced_backend()
    )


def step_32bit(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *settings: float | None) -> None:
    """The same step with float32 states, for tensors too small to be worth coding.

    Args:
        param: as in `step_8bit`.
        grad: as in `step_8bit`.
        exp_avg: float32 m, of param's shape.
        exp_avg_sq: float32 v, of param's shape.
        *settings: those of `step_8bit` without block_size.
    """
    check.tensor("param", param)
    row, stochastic = _row(settings, param.device)
    torch.ops.pcs_kernels.adamw32bit_step(param, grad, exp_avg, exp_avg_sq, row, None, stochastic, forced_backend())
