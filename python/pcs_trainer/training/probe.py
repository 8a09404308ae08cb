"""What a run tells beside its loss, on noise that never changes: how well the subject is predicted, and how far the
prediction for the class's own prompt has moved since the start."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.batches import Batch, seeded
from ..data.prompts import class_prompt
from .losses import picture_losses

if TYPE_CHECKING:
    from .run import Run

TIMES = (0.15, 0.4, 0.65, 0.9)  # parts of the schedule


class Probe:
    """Made before the first step, or before an earlier run's state is read: the start is the same for both."""

    def __init__(self, run: Run) -> None:
        self.run = run
        generator = seeded(run.s.seed, 5)
        pick = torch.linspace(0, len(run.bank) - 1, len(TIMES)).round().long()  # of every subject
        z = run.bank.moments.draw(pick, generator)
        t = torch.tensor([int(part * len(run.model.schedule)) for part in TIMES])
        masks = None if run.bank.masks is None else run.bank.masks[pick]
        noise = torch.randn(z.shape, generator=generator)
        self.subject = Batch(z, [run.bank.prompts[i] for i in pick.tolist()], masks, noise, t, len(t))
        classes = [class_prompt(subject.settings) for subject in run.trainer.subjects]
        self.classes = replace(self.subject, prompts=[classes[i % len(classes)] for i in range(len(t))], masks=None)
        self.at_first = self.held_out()
        self.start = self.of_the_class()

    def measure(self) -> tuple[float, float]:
        """(held-out loss, drift of the class as a part of its prediction)"""
        now = self.of_the_class()
        return self.held_out(), float((now - self.start).norm() / self.start.norm())

    @torch.no_grad()
    def held_out(self) -> float:
        each = [picture_losses(*self.run.predicted(b)) for b in self.parts(self.subject)]
        return float(torch.cat(each).mean())

    @torch.no_grad()
    def of_the_class(self) -> Tensor:
        return torch.cat([self.run.predicted(b)[0].float().cpu() for b in self.parts(self.classes)])

    def parts(self, batch: Batch) -> list[Batch]:
        """As many pictures at a time as a training step has: the probe stays inside the memory of a step."""
        size = self.run.s.batch
        spans = [slice(i, i + size) for i in range(0, len(batch.t), size)]
        return [
            Batch(
                batch.latents[s], batch.prompts[s], None if batch.masks is None else batch.masks[s], batch.noise[s],
                batch.t[s], len(batch.t[s]),
            )
            for s in spans
        ]  # fmt: skip
