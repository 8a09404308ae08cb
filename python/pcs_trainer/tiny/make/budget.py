"""What the training stages share: a time budget that the learning rate follows, checkpoints, progress lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...files import written

LAST_FACTOR = 0.01  # of the learning rate at the end of the budget


def device() -> torch.device:
    """The GPU when one is at hand, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Budget:
    """Minutes of training, those of earlier runs included; the learning rate follows the share that is spent.

    Args:
        minutes: training time over all runs of a stage.
        spent: seconds that earlier runs have spent.
        warmup_steps: optimizer steps in which the learning rate rises to its value.
        flat_until: share of the budget up to which it stays there.
    """

    def __init__(self, minutes: float, spent: float = 0.0, warmup_steps: int = 100, flat_until: float = 0.5) -> None:
        self.seconds, self.spent = minutes * 60.0, spent
        self.warmup_steps, self.flat_until = warmup_steps, flat_until
        self._last = time.monotonic()

    def tick(self) -> None:
        """Count the time since the last call as spent."""
        now = time.monotonic()
        self.spent += now - self._last
        self._last = now

    @property
    def share(self) -> float:
        return min(1.0, self.spent / self.seconds)

    @property
    def over(self) -> bool:
        return self.spent >= self.seconds

    def factor(self, step: int) -> float:
        """Share of the learning rate at `step`: a linear warm-up, flat, then a half cosine down to LAST_FACTOR."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        tail = max(0.0, (self.share - self.flat_until) / (1 - self.flat_until))
        cosine = 0.5 * (1 + float(torch.cos(torch.tensor(tail * torch.pi))))
        return warm * (LAST_FACTOR + (1 - LAST_FACTOR) * cosine)


class Progress:
    """One line every few seconds: step, means of the values since the last line, samples per second, minutes left."""

    def __init__(self, name: str, budget: Budget, every: float = 20.0, report: Callable[[str], object] = print) -> None:
        self.name, self.budget, self.every, self.report = name, budget, every, report
        self.since = time.monotonic()
        self.samples, self.count = 0, 0
        self.sums: dict[str, float] = {}

    def update(self, step: int, samples: int, **values: float) -> None:
        """Count one optimizer step of `samples` samples, and report when it is time."""
        self.samples += samples
        self.count += 1
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value)
        now = time.monotonic()
        if now - self.since < self.every:
            return
        shown = "  ".join(f"{k} {v / self.count:.4f}" for k, v in self.sums.items())
        left = max(0.0, self.budget.seconds - self.budget.spent) / 60
        self.report(
            f"{self.name} step {step}  {shown}  {self.samples / (now - self.since):.0f} samples/s  {left:.1f} min left"
        )
        self.since, self.samples, self.count, self.sums = now, 0, 0, {}


def save_checkpoint(state: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint whole or not at all."""
    written(Path(path), lambda part: torch.save(state, part))


def load_checkpoint(path: str | Path) -> dict[str, Any] | None:
    """The checkpoint at `path`, on the CPU; None where there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if Path(path).exists() else None
