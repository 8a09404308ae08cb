"""What one program of every launch of the tables executes and moves, at the real shapes of the models.

The tables are the ops' own `aot_cases`: the same calls that are compiled for the budget, on tensors of zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pcs_kernels import _launch
from tests.triton_budget import implementation

from .launcher import Launch, device

MATRIX = ("mma", "wgmma.mma_async")


@dataclass(frozen=True)
class Counted:
    """`instructions` and `matrix` are those of one warp of the first program: all its warps are in lockstep."""

    name: str  # of the kernel and its shape
    programs: int
    warps: int
    instructions: int
    matrix: int
    ratios: dict[str, float]  # of sectors or passes to the fewest possible, by kind of access
    sectors: int  # of global memory, of 32 bytes
    tensor_bytes: int  # of all programs' tensors, each argument for itself: the tables pass one tensor as several


def counted(op: str, architecture: int, wanted: Callable[[str], bool] = lambda label: True) -> list[Counted]:
    """The op's launches whose label is wanted, each specialisation once."""
    module, found, seen = implementation(op), [], set()

    def record(arch: int, label: str, call: Callable[[], Any]) -> list[Any]:
        if not wanted(label):
            return []
        cases = _launch.record(arch, label, call)
        if all(case.key in seen for case in cases):
            return []
        gpu.launches.clear()
        with torch.no_grad():
            call()
        for case, launch in zip(cases, gpu.launches, strict=True):
            if case.key not in seen:
                seen.add(case.key)
                found.append(_count(case.name, launch))
        return []

    with device(architecture, first_program_only=True, count_traffic=True) as gpu, _real_tensors(module, record):
        module.aot_cases(architecture)
    return found


@contextlib.contextmanager
def _real_tensors(module: Any, record: Callable[..., Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "meta", _zeros))
        stack.enter_context(mock.patch.object(module, "record", record))
        if hasattr(module, "is_dynamic"):  # the optimizer's tables of codes are zeros here
            stack.enter_context(mock.patch.object(module, "is_dynamic", lambda table, signed: True))
        yield


def _zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _count(name: str, launch: Launch) -> Counted:
    assert launch.traffic is not None
    costs = launch.traffic.costs
    return Counted(
        name=name,
        programs=launch.grid[0] * launch.grid[1] * launch.grid[2],
        warps=launch.kernel.threads // 32,
        instructions=launch.executed.total(),
        matrix=sum(n for opcode, n in launch.executed.items() if opcode.startswith(MATRIX)),
        ratios={kind: round(cost.ratio, 2) for kind, cost in sorted(costs.items())},
        sectors=sum(cost.done for kind, cost in costs.items() if kind.startswith("global")),
        tensor_bytes=launch.tensor_bytes,
    )
