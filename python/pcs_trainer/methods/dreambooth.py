"""DreamBooth (arXiv 2208.12242): a rare word is bound to the subject by training the whole UNet.

Trains   every tensor of the UNet, on request the text encoder's too.
Loss     E |eps_hat(x_t, t, "a [V] [class]") - eps|^2 + lambda E |eps_hat(x'_t', t', "a [class]") - eps'|^2   (eq. 2)
         with class images x' that the frozen model drew, lambda = 1; each half has its own t and noise.
Default  800 steps of 1 + 1 pictures, 5e-6, AdamW, gradients clipped to norm 1.

stage="super_resolution" trains an up-scaler, a UNet that reads a small picture in further channels, with the noise
on that picture cut to `noise_level` (section 3.3): more of it blurs the subject's detail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..concept import grammar
from ..model.model import Model
from ..model.text_adapters import file_name
from ..settings import Identifier, Settings
from .learner import Learner
from .method import ExtraInput, Method


@dataclass(kw_only=True)
class DreamBooth(Settings):
    """The paper's values."""

    identifier: Identifier = "rare"
    template: str | tuple[str, ...] = "a {subject}"
    class_template: str = "a {class}"
    steps: int = 800
    batch: int = 1
    learning_rate: float = 5e-6
    prior_weight: float = 1.0
    prior_images: int = 100
    step_in_backward: bool = True
    train_text_encoder: bool = False
    stage: Literal["base", "super_resolution"] = "base"  # the other trains an up-scaler
    noise_level: float = 1e-5  # super_resolution: variance of the noise laid on the small picture


def setup(model: Model, s: DreamBooth, learner: Learner) -> None:
    """The whole UNet, and what the settings add."""
    learner.train_whole_unet()
    train_text_encoders(model, s, learner)
    learner.add_subject_word(s)


def train_text_encoders(model: Model, s: DreamBooth, learner: Learner) -> None:
    """Every tensor of the text encoders, where the settings ask for it."""
    if not s.train_text_encoder:
        return
    for part, encoder in zip(grammar.TEXT_PARTS, model.text_encoders, strict=False):
        for name, parameter in encoder.named_parameters():
            learner.train_value(grammar.value_name(part, file_name(name)), parameter, master=False)


def small_picture(s: DreamBooth) -> ExtraInput | None:
    """What an up-scaler is told: the picture at a quarter of its size, upsampled, with some noise on it."""
    if s.stage == "base":
        return None

    def channels_of(latents: Tensor, channels: int, generator: torch.Generator) -> Tensor:
        small = F.interpolate(latents[:, :channels], scale_factor=0.25, mode="area")  # [B, channels, h / 4, w / 4]
        small = F.interpolate(small, size=latents.shape[2:], mode="bilinear", align_corners=False)
        noise = torch.randn(small.shape, generator=generator).to(small)
        return (1 - s.noise_level) ** 0.5 * small + s.noise_level**0.5 * noise  # [B, channels, h, w]

    return channels_of


METHOD = Method(
    settings=DreamBooth,
    setup=setup,
    paper="https://arxiv.org/abs/2208.12242",
    trains="the whole UNet; prior-preservation loss on generated class images",
    choose="the closest likeness, when GPU memory and a file of the UNet's size are acceptable",
    tiny={"steps": 350, "batch": 2, "learning_rate": 3e-4, "prior_images": 32},
    extra_input=small_picture,
)
