"""Calls whose compiled kernels are run and compared with the reference: those of tests/op_cases.py, and the optimizer.

ORDINARY are the few of the ordinary test run: every kernel at least once, sizes that leave a tail on every axis, rows
that are not aligned, strided and channels-last memory, an adapter of its own for each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import pcs_kernels
from pcs_kernels.ops.adamw8bit import codes
from pcs_kernels.ops.group_norm_silu import triton_impl as norm
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


def every_check() -> list[Check]:
    optimizer = [Check("adamw 8 bit", optimizer_8bit), Check("adamw 32 bit", optimizer_32bit)]
    cases = [*map(of_case, all_cases())]
    norms = [in_pieces(check) for check in cases if check.name.startswith("group_norm")]
    return [*cases, *norms, *optimizer]


def ordinary_checks() -> list[Check]:
    named = {check.name: check for check in every_check()}
    return [named[name] for name in (*ORDINARY, "adamw 8 bit", "adamw 32 bit")]
