"""DreamBooth-LoRA: DreamBooth (arXiv 2208.12242) with low-rank residuals W + B A on all attention projections.

Trains   to_q, to_k, to_v and to_out.0 of every attention, 199,296 parameters a rank on SD 1.x; on request the text
         encoder's q, k, v and out too, at the same rate.
Init     A ~ N(0, 1 / rank^2) as PEFT's "gaussian" has it, B = 0.
Loss     DreamBooth's.
Default  rank 4, 500 steps of 1 + 1 pictures, 1e-4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..concept import grammar
from ..model.model import Model
from ..model.text_adapters import layers_read, text_module
from ..unet.layers import Linear
from .dreambooth import DreamBooth, small_picture, train_whole_encoders, without_prior
from .learner import Learner, fresh_pair
from .method import Method

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
ENCODER_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(kw_only=True)
class DreamBoothLoRA(DreamBooth):
    """What people use: the paper knows no low-rank form."""

    steps: int = 500
    learning_rate: float = 1e-4
    step_in_backward: bool = False
    rank: int = 4
    init: Literal["zero_up", "both_random"] = "zero_up"  # both_random: the second half is small, not zero
    text_encoder_form: Literal["lora", "whole"] = "lora"  # what trains of the text encoder, if anything does

    def encoder_rate(self) -> float:
        """One rate for all residuals, unless another is asked for."""
        given = self.text_encoder_learning_rate
        return self.learning_rate if given is None else given


def setup(model: Model, s: DreamBoothLoRA, learner: Learner) -> None:
    """A residual on every projection of every attention."""
    for name, layer in attention_projections(model):
        learner.attach("unet", name, fresh_pair(layer, s.rank, s.init, learner.generator, spread=1 / s.rank))
    train_text_encoders(model, s, learner)
    learner.add_subject_word(s)


def train_text_encoders(model: Model, s: DreamBoothLoRA, learner: Learner) -> None:
    """A residual on every projection of the text encoders' attentions, or the whole encoders, where it is asked for."""
    if not s.train_text_encoder:
        return
    if s.text_encoder_form == "whole":
        train_whole_encoders(model, learner)
        return
    for part, encoder in zip(grammar.TEXT_PARTS, model.text_encoders, strict=False):
        for number in range(layers_read(model.text_encoders, encoder)):
            for projection in ENCODER_PROJECTIONS:
                name = f"text_model.encoder.layers.{number}.self_attn.{projection}"
                layer = text_module(encoder, name)
                learner.attach(part, name, fresh_pair(layer, s.rank, s.init, learner.generator, spread=1 / s.rank))


def attention_projections(model: Model) -> Iterator[tuple[str, Linear]]:
    """Every query, key, value and output projection of the UNet's attentions, by name."""
    for name, layer in model.unet.named_modules():
        if isinstance(layer, Linear) and name.endswith(PROJECTIONS) and (".attn1." in name or ".attn2." in name):
            yield name, layer


METHOD = Method(
    settings=DreamBoothLoRA,
    setup=setup,
    paper="https://arxiv.org/abs/2106.09685",
    trains="low-rank residuals on all attention projections",
    choose="the files everybody exchanges",
    tiny={"steps": 450, "batch": 2, "learning_rate": 1.5e-3, "rank": 8, "prior_images": 32},
    extra_input=small_picture,
    implied=without_prior,
)
