"""What a run minimizes: the loss of one micro-batch, from the data, the model and what the method adds.

Letters: B pictures, C latent channels, h x w latent size, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..data.batches import Batch, Stream, draw_batch, seeded
from ..distributed import rank_and_world
from ..methods.learner import Learner
from ..model.text import Text, encode
from ..model.upscaler import level_labels
from .class_prediction import ClassPrediction
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

    def predicted(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """The prediction for a batch.

        Args:
            batch: the examples before noise.

        Returns:
            prediction and target [B, C, h, w], and the masks [B, 1, h, w] or None.
        """
        unet, schedule, size = self.model.unet, self.model.schedule, self.data.size
        like = unet.conv_in.weight
        x, noise = batch.latents.to(like.device), batch.noise.to(like.device)  # [B, C, h, w]
        t = batch.t.to(like.device)  # [B]
        noisy, target = schedule.add_noise(x, noise, t), schedule.target(x, noise, t)
        if self.own is not None and batch.subjects < len(t):  # first: it changes weights that a graph would hold
            at = slice(batch.subjects, None)
            held = self.own(noisy[at].to(compute_dtype(unet)), t[at], batch.prompts[at])  # [B - subjects, C, h, w]
            target = torch.cat([target[: batch.subjects], held.to(target)])
        text = self.text(batch.prompts).to(torch.empty(0, dtype=compute_dtype(unet), device=like.device))
        kv, added = self.method.hold_text(unet.text_kv(text.states)), text.added(size, size)
        if batch.small is not None:
            noisy = torch.cat([noisy, batch.small.to(noisy)], dim=1)  # [B, C + 3, h, w]
            added = (added or {}) | level_labels(self.model, self.small_noise or 0.0, len(noisy))
        prediction = unet(noisy.to(compute_dtype(unet)), t, kv, added)
        return prediction, target, None if batch.masks is None else batch.masks.to(like.device)

    def loss(self, batch: Batch, step: int, micro: int = 0) -> tuple[Tensor, dict[str, float]]:
        """The loss of one micro-batch.

        Returns:
            the loss, and its parts for the log: "loss", "subject" and, where there are such, "prior", "preservation".
        """
        s = self.s
        each = picture_losses(*self.predicted(batch))  # [B]
        if s.snr_gamma:
            each = each * snr_weights(self.model.schedule, batch.t.to(each.device), s.snr_gamma)
        subject, prior = each[: batch.subjects].mean(), each[batch.subjects :]
        total, parts = subject, {"subject": float(subject.detach())}
        if len(prior):
            total = total + s.prior_weight * prior.mean()
            parts["prior"] = float(prior.detach().mean())
        if self.side_loss is not None:
            kept = self.side_loss(seeded(s.seed, Stream.SIDE_LOSS, step, micro))
            total, parts["preservation"] = total + kept, float(kept.detach())
        return total, parts | {"loss": float(total.detach())}

    def text(self, prompts: list[str]) -> Text:
        """The text of a batch; a prompt that stands twice is encoded once."""
        if self._texts:
            found = [self._texts[p] for p in prompts]
            states = torch.cat([text.states for text in found if isinstance(text.states, Tensor)])  # [B, T, C]
            pooled = [text.pooled for text in found if text.pooled is not None]
            return Text(states, torch.cat(pooled) if pooled else None, [])
        unique = list(dict.fromkeys(prompts))
        text = encode(self.model, unique, self.learner.rows, self.learner.hold_first)
        index = torch.tensor([unique.index(p) for p in prompts])
        own = text.states
        picked = {n: x[index] for n, x in own.items()} if isinstance(own, dict) else own[index]
        return Text(picked, None if text.pooled is None else text.pooled[index], [])

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
        found = {p: encode(self.model, [p], self.learner.rows, self.learner.hold_first) for p in prompts}
        self.model.release("text_encoders")
        return found


def compute_dtype(unet: nn.Module) -> torch.dtype:
    """What the UNet computes in: its norms' dtype (trained projections may be float32 masters)."""
    weight = unet.get_parameter("conv_norm_out.weight")
    return weight.dtype
