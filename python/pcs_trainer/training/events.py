"""What a running trainer tells: one Event after another; str(event) is a readable line."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Event:
    """kind: start, warning, progress, proof, step, probe, checkpoint, preview, stopped, saved, done.

    progress: a long phase beside the steps, with its label, done, total and seconds_left.
    """

    kind: str
    step: int
    total: int
    data: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        d = self.data
        if self.kind == "progress":
            return f"{d['label']} {d['done']}/{d['total']}, {d['seconds_left']:.0f} s left"
        if self.kind != "step":
            return f"[{self.step}/{self.total}] {self.kind}: {d.get('text') or d.get('path') or ''}"
        parts = [f"[{self.step}/{self.total}] loss {d['loss']:.4f} ({d['smoothed']:.4f} smoothed"]
        parts[0] += f", subject {d['subject']:.4f}, prior {d['prior']:.4f})" if d.get("prior") is not None else ")"
        parts.append(f"{d['its_per_second']:.2f} it/s, {d['seconds_left']:.0f} s left, {d['peak_memory'] / 1e9:.2f} GB")
        return ", ".join(parts)


def peak_memory() -> int:
    """Bytes: of the GPU's allocator where one is used, else the process's largest resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
