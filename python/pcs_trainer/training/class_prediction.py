"""The prior term without class images: the frozen model's own prediction for the class prompt is the target.

    E |eps_hat(x_t, t, "a [class]") - eps_0(x_t, t, "a [class]")|^2    x_t: the subject's own noisy latents

eps_0 is the model before training, so a class that has not moved costs nothing, where class images cost their noise.
Nothing is sampled before step 1; each step has one more forward without a gradient.
"""

from __future__ import annotations

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
        self.prompts = list(dict.fromkeys(task.class_prompts))
        with torch.no_grad(), learner.base():
            text = encode(task.model, self.prompts).to(like)
            self.kv = self.unet.text_kv(text.states)  # block -> keys and values [P, T, C] of the P prompts
        self.added = text.added(size, size) or {}

    @torch.no_grad()
    def __call__(self, noisy: Tensor, t: Tensor, which: Tensor) -> Tensor:
        """The prediction [B, C, h, w] for noisy [B, C, h, w] at t [B] under prompts number `which` [B]."""
        kv = {block: (k[which].to(noisy), v[which].to(noisy)) for block, (k, v) in self.kv.items()}
        added = {name: x[which].to(noisy) for name, x in self.added.items()} or None
        with self.learner.base():
            return self.unet(noisy, t, kv, added)
