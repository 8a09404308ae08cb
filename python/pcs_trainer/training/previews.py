"""Pictures drawn in the middle of a run, by what has been learned so far."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..sampling.drawing import pictures_at_once, sample
from ..sampling.upscaling import upscale
from .objective import Objective

if TYPE_CHECKING:
    from PIL.Image import Image


def preview_images(objective: Objective, prompts: list[str]) -> list[Image]:
    """An image of each prompt; an up-scaler enlarges the first photos, as it reads them."""
    model, learner, data, seed = objective.model, objective.learner, objective.data, objective.s.seed
    if data.bank.small is None:
        return sample(
            model,
            prompts,
            words=learner.rows,
            seed=seed,
            hold_first=learner.hold_first,
            size=data.size,
            batch=pictures_at_once(model, data.size),
        )
    small = data.bank.small[torch.arange(len(prompts)) % len(data.bank)]
    pixels = ((small + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return upscale(
        model,
        list(pixels),
        prompts,
        noise_level=objective.small_noise,
        words=learner.rows,
        seed=seed,
        hold_first=learner.hold_first,
    )
