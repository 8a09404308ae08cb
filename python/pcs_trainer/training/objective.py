"""What a run minimizes: the loss of one micro-batch, from the data, the model and what the method adds.

Letters: B pictures, C latent channels, h x w latent size, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, Stream, draw_batch, seeded
from ..distributed import rank_and_world
from ..methods.learner import Learner
from ..model.text import Reading, Text, encode, read
from ..model.turns import turn
from ..model.upscaler import level_labels
from .class_prediction import ClassPrediction
from .inputs import Inputs, on_device
from .losses import drawn_timesteps, picture_losses, snr_weights
from .task import Prepared, Task


class Objective:
    """The loss of a run; where the text is frozen, its states are computed here once and the encoders leave memory.

    Args:
        task: what the run is asked to do.
        data: its photos and class images.
        learner: what trains, on the model.
    """

    def __init__(self, task: Task, data: Prepared, learner: Learner) -> None:
        self.task, self.data, self.learner = task, data, learner
        self.model, self.s, self.method = task.model, task.settings, task.method
        self.side_loss = self.method.side_loss(self.model, [subject.settings for subject in task.subjects])
        self.small_noise = self.method.extra_input(self.s)
        self.device = self.model.unet.conv_in.weight.device
        self.schedule = self.model.schedule.on(self.device)
        # Before the first step and before a checkpoint is read: the model is still the base model.
        self.own = ClassPrediction(task, learner, data.size) if self.s.prior == "own" else None
        self._texts = {} if learner.text_trains else self._frozen_texts()

    def batch(self, step: int, micro: int) -> Batch:
        """The examples of one micro-batch: a function of the seed, the step and the micro-batch alone."""
        s = self.s

        def timesteps(count: int, generator: torch.Generator) -> Tensor:
            return drawn_timesteps(self.model.schedule, s.timesteps, count, generator)

        data, share = self.data, rank_and_world()
        own = self.task.class_prompts if self.own is not None else ()
        noise = self.small_noise
        return draw_batch(data.bank, data.prior, data.names, s, step, micro, share, timesteps, own, noise)

    def inputs(self, batch: Batch, side: Any = None) -> Inputs:
        """A batch as the device reads it, on the device.

        Args:
            batch: the examples before noise.
            side: what the method's further loss reads, where it is asked for.
        """
        text, rows = self._texts_of(batch.prompts)
        own = None
        if self.own is not None and batch.subjects < len(batch.t):
            own = torch.tensor([self.own.prompts.index(prompt) for prompt in batch.prompts[batch.subjects :]])
        tensors = batch.latents, batch.noise, batch.t, batch.masks, batch.small
        found: Inputs = on_device(Inputs(*tensors, text, rows, own, side, batch.subjects), self.device)
        return found

    def predicted(self, given: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """The prediction for a batch: work of the device alone.

        Returns:
            prediction and target [B, C, h, w], and the masks [B, 1, h, w] or None.
        """
        unet, schedule, size = self.model.unet, self.schedule, self.data.size
        x, noise, t = given.latents, given.noise, given.t  # [B, C, h, w] twice, [B]
        noisy, target = schedule.add_noise(x, noise, t), schedule.target(x, noise, t)
        if self.own is not None and given.own is not None:  # first: it changes weights that a graph would hold
            at = slice(given.subjects, None)
            held = self.own(noisy[at].to(compute_dtype(unet)), t[at], given.own)  # [B - subjects, C, h, w]
            target = torch.cat([target[: given.subjects], held.to(target)])
        text = self.text(given).to(torch.empty(0, dtype=compute_dtype(unet), device=self.device))
        kv, added = self.method.hold_text(unet.text_kv(text.states)), text.added(size, size)
        if given.small is not None:
            noisy = torch.cat([noisy, given.small.to(noisy)], dim=1)  # [B, C + 3, h, w]
            added = (added or {}) | level_labels(self.model, self.small_noise or 0.0, len(noisy))
        return unet(noisy.to(compute_dtype(unet)), t, kv, added), target, given.masks

    def loss(self, batch: Batch, step: int, micro: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss_of` a batch."""
        return self.loss_of(self.of_step(batch, step, micro))

    def of_step(self, batch: Batch, step: int, micro: int) -> Inputs:
        """All that a micro-batch of a step reads."""
        drawn = (
            None if self.side_loss is None else self.side_loss.draw(seeded(self.s.seed, Stream.SIDE_LOSS, step, micro))
        )
        return self.inputs(batch, drawn)

    def loss_of(self, given: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch: work of the device alone.

        Returns:
            the loss, and its parts for the log: "loss", "subject" and, where there are such, "prior", "preservation".
        """
        s = self.s
        each = picture_losses(*self.predicted(given))  # [B]
        if s.snr_gamma:
            each = each * snr_weights(self.schedule, given.t, s.snr_gamma)
        subject, prior = each[: given.subjects].mean(), each[given.subjects :]
        total, parts = subject, {"subject": subject.detach()}
        if len(prior):
            total = total + s.prior_weight * prior.mean()
            parts["prior"] = prior.detach().mean()
        if self.side_loss is not None:
            kept = self.side_loss.loss(given.side)
            total, parts["preservation"] = total + kept, kept.detach()
        return total, parts | {"loss": total.detach()}

    def text(self, given: Inputs) -> Text:
        """The text of a batch."""
        if isinstance(given.text, Text):
            return given.text
        text = encode(self.model, given.text, self.learner.rows, self.learner.hold_first)
        own, rows = text.states, given.rows
        assert rows is not None
        picked = {n: x[rows] for n, x in own.items()} if isinstance(own, dict) else own[rows]
        return Text(picked, None if text.pooled is None else text.pooled[rows], [])

    def _texts_of(self, prompts: list[str]) -> tuple[Text | Reading, Tensor | None]:
        """Frozen states of a batch's prompts, or what the encoders read, and its rows: a prompt is encoded once.

        On a GPU the first prompt fills up to as many as there are examples: all batches are then of one shape.
        """
        if self._texts:
            found = [self._texts[p] for p in prompts]
            states = torch.cat([text.states for text in found if isinstance(text.states, Tensor)])  # [B, T, C]
            pooled = [text.pooled for text in found if text.pooled is not None]
            return Text(states, torch.cat(pooled) if pooled else None, []), None
        unique = list(dict.fromkeys(prompts))
        rows = torch.tensor([unique.index(p) for p in prompts])
        if self.device.type != "cpu":
            unique += unique[:1] * (len(prompts) - len(unique))
        return read(self.model, unique, self.learner.rows), rows

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """Every loaded parameter that must not move, by name."""
        trained = {id(p) for p in self.learner.parameters.values()}
        for part in ("unet", "text_encoders"):
            if part in self.model.loaded:
                modules: list[nn.Module] = [self.model.unet] if part == "unet" else list(self.model.text_encoders)
                for module in modules:
                    yield from ((f"{part}.{n}", p) for n, p in module.named_parameters() if id(p) not in trained)

    @torch.no_grad()
    def _frozen_texts(self) -> dict[str, Text]:
        prompts = sorted({*self.data.prompts, *self.task.class_prompts})
        with turn(self.model, "text_encoders"):
            found = {p: encode(self.model, [p], self.learner.rows, self.learner.hold_first) for p in prompts}
        self.model.release("text_encoders")
        return found


def compute_dtype(unet: nn.Module) -> torch.dtype:
    """What the UNet computes in: its norms' dtype (trained projections may be float32 masters)."""
    weight = unet.get_parameter("conv_norm_out.weight")
    return weight.dtype
