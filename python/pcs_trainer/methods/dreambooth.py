"""DreamBooth (arXiv 2208.12242): a rare word is bound to the subject by training the whole UNet.

Trains   every tensor of the UNet, on request the text encoder's too, at 0.4 of the UNet's rate.
Loss     E |eps_hat(x_t, t, "a [V] [class]") - eps|^2 + lambda E |eps_hat(x'_t', t', "a [class]") - eps'|^2   (eq. 2)
         with class images x' that the frozen model drew, lambda = 1; each half has its own t and noise.
Default  800 steps of 1 + 1 pictures, 5e-6, AdamW, gradients clipped to norm 1.

stage="super_resolution" trains an up-scaler instead, a UNet that reads the photo reduced to a pixel for each latent
position (the paper's personalized super-resolution). The variance of the noise on that small picture is cut to
`noise_level`: with the 1e-3 that the paper's up-scalers were made with, the subject's fine detail blurs. There are no
class images: an up-scaler draws none from a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..concept import grammar
from ..model.model import Model
from ..model.text_adapters import file_name, is_read
from ..settings import Identifier, Settings
from .learner import Learner
from .method import Method

ENCODER_SHARE = 0.4  # of learning_rate: the paper's 2e-6 for the text encoder beside 5e-6 for the UNet


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
    text_encoder_learning_rate: float | None = None  # None: a share of learning_rate that is the method's
    stage: Literal["base", "super_resolution"] = "base"  # the other trains an up-scaler
    noise_level: float = 1e-5  # super_resolution: variance of the noise laid on the small picture

    def encoder_rate(self) -> float:
        """The text encoder's own rate."""
        given = self.text_encoder_learning_rate
        return ENCODER_SHARE * self.learning_rate if given is None else given

    def check(self) -> None:
        """Refuse a rate for what does not train, and what an up-scaler cannot be trained with."""
        super().check()
        rate = self.text_encoder_learning_rate
        if rate is not None and not self.train_text_encoder:
            raise ValueError(
                "text_encoder_learning_rate does nothing without train_text_encoder; give both, or neither"
            )
        if rate is not None and not 0 < rate < 1:
            raise ValueError(f"text_encoder_learning_rate must lie between 0 and 1, not {rate!r}")
        if not 0 <= self.noise_level < 1:
            raise ValueError(f"noise_level is a variance, at least 0 and below 1, not {self.noise_level!r}")
        if self.stage == "super_resolution" and self.prior_weight and not self.prior_folder:
            raise ValueError(
                f"prior_weight={self.prior_weight:g} needs class images, and an up-scaler draws none from a prompt. "
                "Fix: prior_weight=0, the default of stage='super_resolution', or real ones with prior_folder=..."
            )


def setup(model: Model, s: DreamBooth, learner: Learner) -> None:
    """The whole UNet, and what the settings add."""
    learner.train_whole_unet()
    if s.train_text_encoder:
        train_whole_encoders(model, learner)
    learner.add_subject_word(s)


def train_whole_encoders(model: Model, learner: Learner) -> None:
    """Every tensor of the text encoders that the UNet's inputs depend on."""
    for part, encoder in zip(grammar.TEXT_PARTS, model.text_encoders, strict=False):
        for name, parameter in encoder.named_parameters():
            if not is_read(model.text_encoders, encoder, name):
                continue
            said = grammar.value_name(part, file_name(name))
            learner.train_value(said, parameter, master=False)
            # A key's bias adds the same number to all scores of a query, and softmax takes it away again: its gradient
            # is rounding alone, in 16 bits also zero. It trains with the others, as in checkpoints of older versions.
            if name.endswith("self_attn.k_proj.bias"):
                learner.indifferent.add(said)


def small_picture(s: DreamBooth) -> float | None:
    """The variance of the noise on the small picture that an up-scaler reads; None in the base stage."""
    return s.noise_level if s.stage == "super_resolution" else None


def without_prior(given: Mapping[str, Any]) -> dict[str, Any]:
    """No class images where an up-scaler is trained."""
    return {"prior_weight": 0.0} if given.get("stage") == "super_resolution" else {}


METHOD = Method(
    settings=DreamBooth,
    setup=setup,
    paper="https://arxiv.org/abs/2208.12242",
    trains_whole_unet=True,
    trains="the whole UNet; prior-preservation loss on generated class images",
    choose="the closest likeness, when GPU memory and a file of the UNet's size are acceptable",
    tiny={"steps": 350, "batch": 2, "learning_rate": 3e-4, "prior_images": 32},
    extra_input=small_picture,
    implied=without_prior,
)
