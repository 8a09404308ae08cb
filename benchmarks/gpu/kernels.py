"""Each Triton kernel's time on the card beside what benchmarks/roofline.py models for it.

The calls are those of the ops' compile tables, whose kernels tests/ptx/counted.json has counted; their times come from
torch's profiler. A card that roofline.py knows has its three modelled times; any other has the memory's alone, from the
tensors' bytes and the card's own copy rate.  python -m benchmarks.gpu.kernels OP  runs an op's calls once, for ncu.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import roofline, timing
from benchmarks.gpu.row import Absent, Machine, Row
from tests.triton_budget import OPS, implementation

REPEATS = 10
Call = Callable[[], Any]


def calls(op: str, arch: int, device: str) -> list[tuple[str, Call]]:
    """(label, call) of the op's compile table, on tensors of random numbers."""
    found: list[tuple[str, Call]] = []

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype, device=device)
        return torch.randn(shape, device=device).to(dtype)

    def keep(_arch: int, label: str, call: Call) -> list[Any]:
        found.append((label, call))
        return []

    module = implementation(op)
    with mock.patch.object(module, "meta", tensor), mock.patch.object(module, "record", keep):
        module.aot_cases(arch)
    return found


def run_call(op: str, call: Call) -> None:
    """One call; the optimizer's tables of codes are zeros here, which it is told to take."""
    module = implementation(op)
    tables = {"is_dynamic": lambda table, signed: True} if hasattr(module, "is_dynamic") else {}
    with torch.no_grad(), mock.patch.multiple(module, **tables) if tables else mock.patch.dict({}):
        call()


def measured(op: str, call: Call) -> list[tuple[str, float]]:
    """(kernel, microseconds) of each launch of a call, in order; the median of several calls."""
    for _ in range(3):
        run_call(op, call)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        for _ in range(REPEATS):
            run_call(op, call)
        torch.cuda.synchronize()
    events = [e for e in traced.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
    events = sorted((e for e in events if e.name.endswith("_kernel")), key=lambda e: e.time_range.start)
    each = len(events) // REPEATS
    if not each or len(events) % REPEATS:
        raise RuntimeError(f"the profiler saw {len(events)} launches in {REPEATS} equal calls")
    return [
        (events[i].name, sorted(e.time_range.elapsed_us() for e in events[i::each])[REPEATS // 2]) for i in range(each)
    ]


def counted(op: str, arch: int) -> list[dict[str, Any]]:
    """What is known of the op's kernels on an architecture, or the last counted one before it, in the table's order."""
    tables = json.loads(roofline.COUNTED.read_text())
    known = sorted(int(name.removeprefix("sm_")) for name in tables if name.startswith("sm_"))
    found: list[dict[str, Any]] = tables[f"sm_{max((a for a in known if a <= arch), default=known[0])}"][op]
    return found


def modelled(kernel: dict[str, Any], card: str, copied: float) -> dict[str, float]:
    """Microseconds; `copied` is the card's copy rate in bytes a second."""
    for known in roofline.CARDS:
        if known.name in card:
            found = roofline.times(kernel, known)
            return found.roofline | found.busiest
    return {"memory": 1e6 * kernel["tensor_bytes"] / copied}


def beside(
    op: str, arch: int, found: dict[str, list[tuple[str, float]]], card: str, copied: float
) -> list[dict[str, Any]]:
    """Measured and modelled times of the op's counted kernels; a kernel that did not run is an error."""
    waiting = {label: list(launches) for label, launches in found.items()}
    lines = []
    for kernel in counted(op, arch):
        name, _, label = kernel["name"].partition(" ")
        launches = waiting.get(label, [])
        place = next((i for i, (launched, _) in enumerate(launches) if launched == name), None)
        if place is None:
            ran = sorted({launched for launched, _ in found.get(label, [])})
            raise RuntimeError(f"{name} did not run at {label!r}; these did: {', '.join(ran) or 'none'}")
        times = modelled(kernel, card, copied)
        line = {"kernel": kernel["name"], "us": launches.pop(place)[1], "modelled_us": times}
        lines.append(line | {"of_modelled": line["us"] / max(times.values())})
    return lines


def row_of(op: str, machine: Machine) -> dict[str, Any]:
    if machine.smoke:
        raise Absent("the kernels of this table run on CUDA alone")
    major, minor = torch.cuda.get_device_capability()
    found: dict[str, list[tuple[str, float]]] = {}
    arch = 10 * major + minor
    for label, call in calls(op, arch, "cuda"):
        found.setdefault(label, []).extend(measured(op, call))
    big = torch.randn(1 << 28, device="cuda")
    copied = 2 * big.nbytes / sorted(timing.interleave({"copy": lambda: big.clone()}, 5)["copy"])[2]
    lines = beside(op, arch, found, torch.cuda.get_device_name(), copied)
    shown = [f"{line['kernel']} {line['us']:.1f} us, {line['of_modelled']:.1f} x modelled" for line in lines]
    every = {label: [list(launch) for launch in launches] for label, launches in found.items()}
    return {"kernels": lines, "launches_us": every, "said": "\n  " + "\n  ".join(shown)}


def rows(smoke: bool) -> list[Row]:
    return [Row(op, functools.partial(row_of, op)) for op in OPS]


if __name__ == "__main__":
    for _, only in calls(sys.argv[1], 10 * torch.cuda.get_device_capability()[0], "cuda"):
        run_call(sys.argv[1], only)
    torch.cuda.synchronize()
