"""Every op against torch's composition and other libraries: by the host's clock, and by CUDA graph.

A call of a small op takes the host longer than the device; the clock shows what a training step without a graph pays,
the graph what the kernels need. Each case passes the tests' tolerance rule first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch

from benchmarks import registry, run, timing
from benchmarks.gpu.book import sentence
from benchmarks.gpu.row import Machine, Row
from pcs_kernels.optim import AdamW8bit

DTYPES = (torch.bfloat16, torch.float32)
LARGE = 860_000_000  # parameters of SD 1.5's UNet
SMOKE = "geglu sd15 512 level 2"


def device_ms(call: Callable[[], object]) -> float | str:
    """A call's time from one CUDA graph of many; where it cannot be recorded, the reason."""
    from triton.testing import do_bench_cudagraph

    try:
        return float(do_bench_cudagraph(call, rep=20))
    except Exception as error:
        torch.cuda.synchronize()  # a lost context is an error of the row
        return f"not recorded: {sentence(error)}"


def direction(turn: Callable[..., run.Call], case: run.Case, ours: Callable, machine: Machine) -> dict[str, Any]:
    """Ours and every peer, by both clocks; a peer that is not installed says so."""
    calls, absent = {"ours": turn(ours, case.inputs)}, {}
    for peer, theirs in case.peers.items():
        try:
            call = turn(theirs, case.inputs)
            call()
            calls[peer] = call
        except (ImportError, NotImplementedError) as error:
            absent[peer] = sentence(error)
    clock = timing.interleave(calls, 2 if machine.smoke else 9, 0.001 if machine.smoke else 0.004)
    found: dict[str, Any] = {
        name: {
            "host_ms": 1e3 * sorted(times)[len(times) // 2],
            "device_ms": None if machine.smoke else device_ms(calls[name]),
            "host_ratio": timing.ratio(times, clock["ours"])[0],
        }
        for name, times in clock.items()
    }
    return {**found, "absent": absent}


def row_of(dtype: torch.dtype, number: int, machine: Machine) -> dict[str, Any]:
    """Case `number` of run.py's, its tensors made on the device."""
    torch.manual_seed(0)
    with torch.device(machine.device):
        case = next(islice(run.cases(dtype), number, None))
        ours = case.ours if machine.smoke else run.on_triton(case.ours)
        run.gate(case, ours)
        found = {
            name: direction(turn, case, ours, machine)
            for name, turn in (("forward", run.forward), ("both", run.with_backward))
        }
    return {**found, "said": "; ".join(f"{name}: {_said(figures)}" for name, figures in found.items())}


def _said(figures: dict[str, Any]) -> str:
    """Ours in microseconds by both clocks, and what each peer takes over it by the device's, or the host's."""
    ours = figures["ours"]
    shown = [f"{1e3 * ours['host_ms']:.0f} us host"]
    on_device = isinstance(ours["device_ms"], float)
    shown += [f"{1e3 * ours['device_ms']:.1f} us device"] if on_device else []
    for name, peer in figures.items():
        if name in ("ours", "absent"):
            continue
        by_device = on_device and isinstance(peer["device_ms"], float)
        ratio = peer["device_ms"] / ours["device_ms"] if by_device else peer["host_ratio"]
        shown.append(f"{name} {ratio:.2f} x")
    return ", ".join(shown)


def optimizers(machine: Machine) -> dict[str, Any]:
    """run.py's comparison of optimizers, on 20 million parameters."""
    with torch.device(machine.device):
        found = list(run.adamw(2 if machine.smoke else 9, machine.device))
    return {"peers": found, "said": "; ".join(f"{row['peer']} {row['ratio'] or row.get('absent')}" for row in found)}


def large_optimizer(machine: Machine) -> dict[str, Any]:
    """One 8-bit step of a whole UNet's parameters in bfloat16, and the bytes that it moves a second."""
    count = 100_000 if machine.smoke else LARGE
    p = torch.nn.Parameter(torch.randn(count, device=machine.device).bfloat16())
    p.grad = torch.randn(count, device=machine.device).bfloat16()
    step = AdamW8bit([p], lr=1e-3).step
    times = sorted(timing.interleave({"ours": step}, 2 if machine.smoke else 9)["ours"])
    took, moved = times[len(times) // 2], 10 * count  # gradient once; parameter and two codes twice
    said = f"{1e3 * took:.2f} ms, {moved / took / 1e12:.3f} TB/s"
    return {"parameters": count, "seconds": took, "bytes_moved": moved, "said": said}


def named(dtype: torch.dtype) -> Iterator[tuple[int, str]]:
    """(number, name) of run.py's cases, whose tensors have no contents here."""
    with torch.device("meta"):
        for number, case in enumerate(run.cases(dtype)):
            yield number, f"{case.op} {case.shape}"


def rows(smoke: bool) -> list[Row]:
    """bfloat16 first; on the CPU one small case."""
    found = []
    for dtype in DTYPES[: 1 if smoke else None]:
        for number, name in named(dtype):
            if not smoke or name == SMOKE:
                found.append(Row(f"{name} {str(dtype)[6:]}", functools.partial(row_of, dtype, number)))
    found.insert(len(found) // 2, Row(f"adamw8bit {registry.ADAMW[0].name}", optimizers)) if not smoke else None
    return [*found, Row(f"adamw8bit {LARGE // 10**6} M parameters", large_optimizer)]
