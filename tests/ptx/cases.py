"""Calls whose compiled kernels are run and compared with the reference: those of tests/op_cases.py, the
optimizer and the first launch.

ORDINARY are the few of the ordinary test run: every kernel at least once, sizes that leave a tail on every axis, rows
that are not aligned, strided and channels-last memory, an adapter of its own for each sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import pcs_kernels
from pcs_kernels import _probe
from pcs_kernels.ops.adamw8bit import codes
from pcs_kernels.ops.group_norm_silu import triton_impl as norm
from pcs_kernels.optim import AdamW8bit
from tests.closeness import assert_no_worse_than
from tests.op_cases import Case, all_cases, evaluate

from .launcher import Gpu, device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ORDINARY = (
    "geglu (7, 682)",
    "group_norm 64/32 contiguous silu",
    "group_norm 341/11 channels last silu",
    "group_norm 341/11 channels last silu in pieces",
    "self_attention (1, 2, 300, 77, 80)",
    "cross_attention (2, 2, 63, 77, 40) with maps",
    "lowrank 7x341->63 r5 masked",
    "lowrank 100x64->640 r32 stacked",
    "conv k3 s2 p1 channels last",
    "linear",
    "int8 conv 64->24 k3 s1",
    "int8 lowrank 341->64",
)


@dataclass(frozen=True)
class Check:
    """`run(dtype, device's options)` raises where the compiled kernels err; it returns the device."""

    name: str
    run: Callable[..., Gpu]


def of_case(case: Case) -> Check:
    def run(dtype: str, architecture: int, **options: Any) -> Gpu:
        kind = DTYPES[dtype]
        with device(architecture, **options) as gpu:
            found = evaluate(case, "triton", kind)
        if not gpu.only_compile:
            exact, low = evaluate(case, "reference", kind, torch.float64), evaluate(case, "reference", kind)
            for name in exact:
                assert_no_worse_than(found[name], exact[name], low[name], f"{case.name}: {name}")
        return gpu

    return Check(case.name, run)


def in_pieces(check: Check) -> Check:
    """A norm whose groups are held by no program: sums over splits of the pixels, as those of a large image."""

    def run(dtype: str, architecture: int, **options: Any) -> Gpu:
        with mock.patch.object(norm, "GROUP_TILE", 0), mock.patch.object(norm, "GROUP_BACKWARD_TILE", 0):
            return check.run(dtype, architecture, **options)

    return Check(f"{check.name} in pieces", run)


def _optimizer_state(n: int, kind: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    param, grad = torch.randn(n).to(kind), torch.randn(n).to(kind)
    count = codes.blocks(n, 256)
    state = [*(torch.randint(0, 256, (n,), dtype=torch.uint8) for _ in range(2)), torch.rand(count), torch.rand(count)]
    return param, grad, state


def _step_8bit(n: int, kind: torch.dtype, backend: str) -> list[Tensor]:
    param, grad, state = _optimizer_state(n, kind)
    maps = codes.code_map(True), codes.code_map(False)
    numbers = 1e-3, 0.9, 0.999, 1e-8, 1e-2, 3, 256, 0.5, 11, True
    with pcs_kernels.backend(backend):
        pcs_kernels.ops.adamw8bit.step_8bit(param, grad, *state, *maps, *numbers)
    return [param, *state]


def optimizer_8bit(dtype: str, architecture: int, **options: Any) -> Gpu:
    """One step of two blocks and a tail. A moment halfway between two codes, but for a rounding, may take either."""
    kind, n = DTYPES[dtype], 1100
    with device(architecture, **options) as gpu:
        found = _step_8bit(n, kind, "triton")
    if gpu.only_compile:
        return gpu
    wanted = _step_8bit(n, kind, "reference")
    unit = torch.finfo(kind).eps * float(wanted[0].float().abs().max())
    assert float((found[0].float() - wanted[0].float()).abs().max()) <= unit, "the parameters differ"
    assert int((found[0] != wanted[0]).sum()) <= 2, "stochastic rounding differs"
    for codes_found, codes_wanted in zip(found[1:3], wanted[1:3], strict=True):
        distance = (codes_found.int() - codes_wanted.int()).abs()
        assert int(distance.max()) <= 1 and int(distance.sum()) <= n // 500, "the codes differ"
    for scale_found, scale_wanted in zip(found[3:], wanted[3:], strict=True):
        torch.testing.assert_close(scale_found, scale_wanted, rtol=1e-6, atol=0)
    return gpu


def optimizer_32bit(dtype: str, architecture: int, **options: Any) -> Gpu:
    """One step of a small tensor, whose moments stay float32."""
    kind, results = DTYPES[dtype], []
    gpu = None
    for backend in ("triton", "reference"):
        param, grad, _ = _optimizer_state(77, kind)
        state = [torch.full((77,), 0.1), torch.full((77,), 0.2)]
        numbers = 1e-2, 0.9, 0.99, 1e-8, 0.1, 2, 1.0, 5, True
        if backend == "triton":
            with device(architecture, **options) as gpu, pcs_kernels.backend(backend):
                pcs_kernels.ops.adamw8bit.step_32bit(param, grad, *state, *numbers)
        else:
            with pcs_kernels.backend(backend):
                pcs_kernels.ops.adamw8bit.step_32bit(param, grad, *state, *numbers)
        results.append((param, *state))
    assert gpu is not None
    if not gpu.only_compile:
        (found, *moments), (wanted, *exact) = results
        assert int((found != wanted).sum()) <= 1, "stochastic rounding differs"
        for a, b in zip(moments, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    return gpu


SIZES = (5000, 77, 4096, 1030, 6000, 4099)  # of several programs, of one, of whole tiles; 77 and 1030 in float32 states
FLAGS = (True, False, True)  # of three steps: the second is refused


def _many_parameters(kind: torch.dtype) -> list[torch.nn.Parameter]:
    """The last but one in float32: another kind, another launch."""
    torch.manual_seed(0)
    kinds = [torch.float32 if n == 6000 else kind for n in SIZES]
    return [torch.nn.Parameter(torch.randn(n).to(k)) for n, k in zip(SIZES, kinds, strict=True)]


def optimizer_many(dtype: str, architecture: int, **options: Any) -> Gpu:
    """Steps of several tensors in one launch a kind; the gradients are where they were, and then elsewhere."""
    kind, found = DTYPES[dtype], []
    for backend in ("triton", "reference"):
        params = _many_parameters(kind)
        optimizer = AdamW8bit(params, lr=1e-2)
        with contextlib.ExitStack() as stack:
            if backend == "triton":
                gpu = stack.enter_context(device(architecture, **options))
            stack.enter_context(pcs_kernels.backend(backend))
            for k, flag in enumerate(FLAGS):
                for p in params:
                    gradient = torch.randn(p.shape).to(p.dtype)
                    p.grad = gradient if k != 1 else p.grad.copy_(gradient)
                optimizer.step(grad_scale=0.5, finite=torch.tensor(flag))
        found.append((params, optimizer.state_dict()["state"]))
    assert len(gpu.launches) == 3 * len(FLAGS), "a launch a kind and step"
    if gpu.only_compile:
        return gpu
    (params, states), (wanted, wanted_states) = found
    for p, q in zip(params, wanted, strict=True):
        apart = (p.detach().float() - q.detach().float()).abs()
        unit = torch.finfo(p.dtype).eps * float(q.detach().abs().max())
        assert float(apart.max()) <= 8 * unit, "the parameters differ"  # eight roundings in float32
        assert p.dtype == torch.float32 or int((apart > 0).sum()) <= 3, "stochastic rounding differs"
    for state, exact in zip(states.values(), wanted_states.values(), strict=True):
        assert state["step"] == exact["step"] == sum(FLAGS)
        for name, value in state.items():
            if name.startswith("state") and value.dtype == torch.uint8:
                distance = (value.int() - exact[name].int()).abs()
                assert int(distance.max()) <= 1 and int(distance.sum()) <= value.numel() // 500, "the codes differ"
            elif name != "step":
                torch.testing.assert_close(value, exact[name], rtol=1e-5, atol=1e-6)
    return gpu


def first_launch(dtype: str, architecture: int, **options: Any) -> Gpu:
    """What is launched before any op on a card; it has no dtype."""
    with device(architecture, **options) as gpu:
        out = torch.zeros(1, dtype=torch.int32)
        _probe.probe_kernel[(1,)](out, _probe.WRITTEN)
    assert gpu.only_compile or int(out) == _probe.WRITTEN
    return gpu


def every_check() -> list[Check]:
    others = [
        Check("first launch", first_launch),
        Check("adamw 8 bit", optimizer_8bit),
        Check("adamw 32 bit", optimizer_32bit),
        Check("adamw many", optimizer_many),
    ]
    cases = [*map(of_case, all_cases())]
    norms = [in_pieces(check) for check in cases if check.name.startswith("group_norm")]
    return [*cases, *norms, *others]


def ordinary_checks() -> list[Check]:
    named = {check.name: check for check in every_check()}
    return [named[name] for name in (*ORDINARY, "first launch", "adamw 8 bit", "adamw 32 bit", "adamw many")]
