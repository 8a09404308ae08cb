"""The prior term without class images: the frozen model's own prediction for the class prompt is the target.

    E |eps_hat(x_t, t, "a [class]") - eps_0(x_t, t, "a [class]")|^2    x_t: the subject's own noisy latents

eps_0 is the model before training, so a class that has not moved costs nothing, where class images cost their noise.
Nothing is sampled before step 1; each step has one more forward without a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed import rank_and_world
from ..methods.learner import Learner
from ..model.text import encode
from .task import Task


class ClassPrediction:
    """What the base model predicts for noisy latents under a class prompt.

    Args:
        task: whose model and class prompts.
        learner: what is switched off for it; a network that trains whole is copied.
        size: pixels a side.

    Raises:
        ValueError: several processes share the network, so that none has all of it.
    """

    def __init__(self, task: Task, learner: Learner, size: int) -> None:
        self.unet, self.learner = task.model.unet, learner
        if learner.trains_whole_network and rank_and_world()[1] > 1:
            raise ValueError(
                f"prior='own' needs the whole UNet as it was, and in {task.settings.method} several processes share "
                "it; train in one process, or give prior='drawn'"
            )
        if task.method.extra_input(task.settings) is not None:
            raise ValueError("prior='own' is made for text-to-image models; leave it out for an up-scaler")
        learner.keep_base()
        like = self.unet.conv_in.weight
        with torch.no_grad(), learner.base():
            texts = {p: encode(task.model, [p]).to(like) for p in dict.fromkeys(task.class_prompts)}
            self.kv = {p: self.unet.text_kv(text.states) for p, text in texts.items()}
        self.added = {p: text.added(size, size) for p, text in texts.items()}

    @torch.no_grad()
    def __call__(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """The prediction [B, C, h, w] for noisy [B, C, h, w] at t [B], one class prompt each."""
        blocks = self.kv[prompts[0]]
        kv = {b: (self._joined(prompts, b, 0).to(noisy), self._joined(prompts, b, 1).to(noisy)) for b in blocks}
        more = [self.added[p] for p in prompts]
        added = {n: torch.cat([one[n] for one in more if one is not None]).to(noisy) for n in more[0] or ()} or None
        with self.learner.base():
            return self.unet(noisy, t, kv, added)

    def _joined(self, prompts: Sequence[str], block: str, half: int) -> Tensor:
        """The keys (0) or values (1) that a block reads of several prompts."""
        return torch.cat([self.kv[p][block][half] for p in prompts])  # [B, T, C]
