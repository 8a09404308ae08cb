"""Personalized Residuals on SD 1.5, the step that most people run: eager and graphed, host and device, weight layouts.

"host" and "device" are from torch's profiler: the time of a step on the clock beside the sum of its kernels' times.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.rehearsed import channels_last, eager_step, graphed_step, measured, model_name, rehearsed, seconds
from benchmarks.gpu.row import Absent, Machine, Row

METHOD = "personalized_residuals"
LARGEST = 12  # kernels that the trace names


def step(images: int, graph: bool, machine: Machine) -> dict[str, Any]:
    if graph and machine.smoke:
        raise Absent("a CUDA graph needs CUDA")
    real = rehearsed(machine, model_name(machine), METHOD, images, in_backward=False if graph else None)
    return measured(machine, graphed_step(real) if graph else eager_step(real), images)


def trace(images: int, machine: Machine) -> dict[str, Any]:
    """Where a step's time goes: what the device is busy with, and whether it waits for the host."""
    real = rehearsed(machine, model_name(machine), METHOD, images)
    took = seconds(real.step, 2 if machine.smoke else 5)
    kinds = [ProfilerActivity.CPU, *([] if machine.smoke else [ProfilerActivity.CUDA])]
    with profile(activities=kinds) as traced:
        real.step()
        if not machine.smoke:
            torch.cuda.synchronize()
    kernels = kernels_of(traced)
    busy = sum(spent for spent, _ in kernels.values())
    first = sorted(kernels, key=lambda name: -kernels[name][0])[:LARGEST]
    found = {
        "seconds": took,
        "device_us": busy,
        "launches": sum(count for _, count in kernels.values()),
        "largest": [{"kernel": name[:120], "us": kernels[name][0], "calls": kernels[name][1]} for name in first],
    }
    return {**found, "said": f"{1e6 * took:.0f} us a step, {busy:.0f} of them busy in {found['launches']} kernels"}


def kernels_of(traced: profile) -> dict[str, tuple[float, int]]:
    """{kernel: (microseconds, calls)} of what ran on the device; nothing without one."""
    found: dict[str, tuple[float, int]] = {}
    for event in traced.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent, count = found.get(event.name, (0.0, 0))
            found[event.name] = (spent + event.time_range.elapsed_us(), count + 1)
    return found


def layout(last: bool, machine: Machine) -> dict[str, Any]:
    """Frozen convolution weights as a checkpoint has them, and channels-last as the activations are."""
    real = rehearsed(machine, model_name(machine), METHOD, 1)
    if last:
        channels_last(real)
    return measured(machine, real.step, 1)


def rows(smoke: bool) -> list[Row]:
    sizes = (1,) if smoke else (1, 4, 8)
    found = [
        Row(f"batch {images}, {'graph' if graph else 'eager'}", functools.partial(step, images, graph))
        for images in sizes
        for graph in (False, True)
    ]
    found += [Row(f"trace, batch {images}", functools.partial(trace, images)) for images in sizes[:2]]
    names = {"contiguous": False, "channels-last": True}
    return [*found, *(Row(f"{name} frozen weights", functools.partial(layout, last)) for name, last in names.items())]
