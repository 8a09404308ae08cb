"""What an up-scaler reads beside the noisy latents: a small picture of what is drawn, and how noisy that picture is.

The small picture has a pixel for each latent position, in red, green and blue in [-1, 1]; noise of a little variance is
laid on it (noise conditioning augmentation, arXiv 2106.15282), and the level of that noise is the UNet's class label.

Letters: B pictures, h x w latent positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..unet.config import COLOURS
from .autoencoder import to_tensor
from .schedule import Schedule

if TYPE_CHECKING:
    from .model import Model


def reduced(pixels: np.ndarray, factor: int) -> Tensor:
    """A picture, uint8 [H, W, 3], with every side divided by the factor: [3, H / factor, W / factor] in [-1, 1]."""
    from PIL import Image

    height, width = pixels.shape[:2]
    # bicubic is what up-scalers are trained on, and what diffusers' pipeline resizes with
    small = Image.fromarray(pixels).resize((width // factor, height // factor), Image.Resampling.BICUBIC)
    return to_tensor(np.asarray(small))


def with_noise(small: Tensor, noise: Tensor, variance: float) -> Tensor:
    """Small pictures [B, 3, h, w] of unit variance with that much of it noise."""
    return (1 - variance) ** 0.5 * small + variance**0.5 * noise


def variance_at(schedule: Schedule, level: int) -> float:
    """The variance of the noise at a level of an up-scaler's `low_res_schedule`."""
    return float(1 - schedule.abar[level].double())


def level_of(schedule: Schedule, variance: float) -> int:
    """The level whose noise is nearest to a variance; the least has more than 0, so small variances share level 0."""
    return int((1 - schedule.abar.double() - variance).abs().argmin())


def level_labels(model: Model, variance: float, count: int) -> dict[str, Tensor]:
    """What the UNet is told about the noise on `count` small pictures: nothing, where it has no classes."""
    classes = model.unet.settings["num_class_embeds"]
    if not classes:
        return {}
    level = level_of(model.low_res_schedule, variance)
    if level >= classes:
        raise ValueError(
            f"a noise variance of {variance:g} is level {level} of {model.name}, whose UNet knows levels below "
            f"{classes}. Fix: noise_level={variance_at(model.low_res_schedule, classes - 1):.3g} or less"
        )
    return {"class_labels": torch.full((count,), level, dtype=torch.long, device=model.unet.conv_in.weight.device)}


def check_upscaler(model: Model) -> None:
    """ValueError, one sentence, where a model cannot enlarge pictures."""
    channels, latents = model.unet.settings["in_channels"], model.unet.settings["out_channels"]
    if not model.upscales:
        raise ValueError(
            f"{model.name} is not an up-scaler: its UNet reads {channels} channels, and an up-scaler's reads its "
            f"{latents} of latents and {COLOURS} of a small picture. Fix: give a model such as "
            "stabilityai/stable-diffusion-x4-upscaler"
        )
