"""The sections, in the order in which a card's first minutes are best spent: what decides the rest comes first."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from benchmarks.gpu.row import Row


class Section(NamedTuple):
    """A section's module, which has rows(smoke), its limit in seconds, and what it asks."""

    module: str
    seconds: float
    about: str


SECTIONS = {
    "probe": Section("probe", 90, "what this machine has, a first Triton kernel, the card's own rates"),
    "tests": Section("kernel_tests", 290, "tests/test_gpu.py and tests/test_gpu_trainer.py, a dtype at a time"),
    "trainer": Section("commands", 290, "the commands that a person types, on the embedded model"),
    "steps": Section("steps", 290, "SD 1.5's step: eager, as a CUDA graph, host against device, weight layouts"),
    "ops": Section("ops", 290, "every op against torch: by the host's clock, and by CUDA graph"),
    "kernels": Section("kernels", 120, "each kernel's time beside the modelled one"),
    "methods": Section("methods", 290, "every method's step: speed, peak against the plan, a hard cap"),
    "headline": Section("headline", 290, "SDXL, a concept in 150 steps, LAG's cost"),
    "tools": Section("tools", 120, "compute-sanitizer and Nsight Compute, where they are installed"),
}


def rows_of(section: str, smoke: bool) -> list[Row]:
    """A section's rows, in the order in which they run."""
    found: list[Row] = importlib.import_module(f"benchmarks.gpu.{SECTIONS[section].module}").rows(smoke)
    return found
