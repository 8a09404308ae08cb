"""A whole optimizer step as the device does it: inputs in, numbers out, and the host never asks in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch
from ..errors import NotTrained
from .graph import Replayed, recorder_for
from .inputs import Inputs
from .objective import Objective
from .optimizer import VERDICT, Stepper

PROVEN = 2  # replays whose loss is compared with an eager step's: the second has other inputs than the recording had
NEAR = 0.02  # of the loss: the same kernels in the same order, but for sums that a GPU's library may order anew


@dataclass(frozen=True)
class Made:
    """What is known of a step before the device has finished it."""

    step: int  # counted from 1
    batches: list[Batch]
    numbers: Tensor  # on the device; the next step may write to it
    before: Any  # what the stepper prepared
    rate: float
    eager: Tensor | None = None  # the losses of a step that was replayed, by an eager forward


class DeviceStep:
    """Step after step of one run.

    Args:
        objective: the loss.
        stepper: the optimizer and what surrounds it.
        warn: told once where steps cannot be recorded.
    """

    def __init__(self, objective: Objective, stepper: Stepper, warn: Callable[[str], None]) -> None:
        self.objective, self.stepper = objective, stepper
        self.accumulate = objective.s.accumulate
        self.parts: list[str] = []  # of the loss, in the order of the numbers
        recorder = recorder_for(objective.s, objective.device)
        self.work = Replayed(self.on_device, recorder, warn, stepper)

    def __call__(self, step: int) -> Made:
        """Have a step done; `step` came before it."""
        batches = [self.objective.batch(step, micro) for micro in range(self.accumulate)]
        inputs = [self.objective.of_step(batch, step, micro) for micro, batch in enumerate(batches)]
        before = self.stepper.prepare(step)
        proof = self.work.replays < PROVEN and self.work.has_recorded(inputs)
        eager = self.eager_losses(inputs) if proof else None
        return Made(step + 1, batches, self.work(inputs), before, self.stepper.rate, eager)

    @torch.no_grad()
    def eager_losses(self, inputs: Sequence[Inputs]) -> Tensor:
        """The loss of each micro-batch without a recording."""
        return torch.stack([self.objective.loss_of(given)[0] for given in inputs]).float()

    def check_replay(self, numbers: Sequence[float], eager: Sequence[float]) -> None:
        """NotTrained where a replayed step had other losses than the same step without the recording."""
        for found, expected in zip((part["loss"] for part in self.losses(numbers)), eager, strict=True):
            if not abs(found - expected) <= NEAR * abs(expected) and expected == expected:
                raise NotTrained(
                    f"a step replayed from its CUDA graph has the loss {found:.4g}, and {expected:.4g} without: the "
                    "recording is wrong on this machine. Fix: --set graph=off"
                )

    def forget(self) -> bool:
        """Let go of recorded steps and their memory; False where there are none."""
        return self.work.forget()

    def on_device(self, inputs: Sequence[Inputs]) -> Tensor:
        """The stepper's numbers, then the parts of each micro-batch's loss."""
        parts: list[dict[str, Tensor]] = []

        def loss_of(micro: int) -> Tensor:
            loss, found = self.objective.loss_of(inputs[micro])
            parts.append(found)
            return loss / self.accumulate

        numbers = self.stepper.run(loss_of)
        self.objective.method.after_step(self.objective.model, self.objective.learner)
        last = parts[-self.accumulate :]  # a two-pass clip computes every loss twice
        self.parts = list(last[0])
        return torch.cat([numbers, torch.stack([found[name] for found in last for name in self.parts]).float()])

    def losses(self, numbers: Sequence[float]) -> list[dict[str, float]]:
        """{part: loss} of each micro-batch."""
        found = iter(numbers[VERDICT:])
        return [{name: next(found) for name in self.parts} for _ in range(self.accumulate)]
