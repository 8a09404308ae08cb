"""What a run tells beside its loss, on noise that never changes: how well the subject is predicted, and how far the
prediction for the class's own prompt has moved since the start."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import pcs_kernels

from ..data.batches import Batch, Stream, seeded
from ..model.upscaler import with_noise
from .losses import picture_losses
from .objective import Objective

TIMES = (0.15, 0.4, 0.65, 0.9)  # parts of the schedule: from fine detail to layout, one picture at each


class Probe:
    """Made before the first step, or before an earlier run's state is read: the start is the same for both."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        bank, model = objective.data.bank, objective.model
        generator = seeded(objective.s.seed, Stream.PROBE)
        pick = torch.linspace(0, len(bank) - 1, len(TIMES)).round().long()  # of every subject
        z = bank.moments.draw(pick, generator)  # [4, C, h, w]
        t = torch.tensor([int(part * len(model.schedule)) for part in TIMES])
        masks = None if bank.masks is None else bank.masks[pick]
        noise = torch.randn(z.shape, generator=generator)
        self.subject = Batch(z, [bank.prompts[i] for i in pick.tolist()], masks, noise, t, len(t))
        if bank.small is not None:
            small = bank.small[pick]
            random = torch.randn(small.shape, generator=generator)
            self.subject.small = with_noise(small, random, objective.small_noise or 0.0)
        classes = objective.task.class_prompts
        self.classes = replace(self.subject, prompts=[classes[i % len(classes)] for i in range(len(t))], masks=None)
        self.at_first = self.held_out()
        self.start = self.of_the_class()

    def measure(self) -> tuple[float, float]:
        """(held-out loss, drift of the class as a part of its prediction)"""
        now = self.of_the_class()
        return self.held_out(), float((now - self.start).norm() / self.start.norm())

    def predicted(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Without packed copies for the shapes of these few forwards: a step's stay the only ones."""
        with pcs_kernels.packing("none"):
            return self.objective.predicted(self.objective.inputs(batch))

    @torch.no_grad()
    def held_out(self) -> float:
        """The loss on noise that training never draws."""
        each = [picture_losses(*self.predicted(b)) for b in self.parts(self.subject)]
        return float(torch.cat(each).mean())

    @torch.no_grad()
    def of_the_class(self) -> Tensor:
        """The prediction for the class's own prompt [4, C, h, w]."""
        return torch.cat([self.predicted(b)[0].float().cpu() for b in self.parts(self.classes)])

    def parts(self, batch: Batch) -> list[Batch]:
        """As many pictures at a time as a training step has: the probe stays inside the memory of a step."""
        size = self.objective.s.batch
        spans = [slice(i, i + size) for i in range(0, len(batch.t), size)]
        return [
            Batch(
                batch.latents[s],
                batch.prompts[s],
                None if batch.masks is None else batch.masks[s],
                batch.noise[s],
                batch.t[s],
                len(batch.t[s]),
                small=None if batch.small is None else batch.small[s],
            )
            for s in spans
        ]
