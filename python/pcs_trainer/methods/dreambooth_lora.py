"""DreamBooth-LoRA: DreamBooth (arXiv 2208.12242) with low-rank residuals W + B A on all attention projections.

Trains   to_q, to_k, to_v and to_out.0 of every attention, 199,296 parameters a rank on SD 1.x; on request the text
         encoder too.
Init     A ~ N(0, 1 / rank), B = 0.
Loss     DreamBooth's.
Default  rank 4, 500 steps of 1 + 1 pictures, 1e-4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..model.model import Model
from ..unet.layers import Linear
from .dreambooth import DreamBooth, small_picture, train_text_encoders, without_prior
from .learner import Learner, fresh_pair
from .method import Method

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(kw_only=True)
class DreamBoothLoRA(DreamBooth):
    """What people use: the paper knows no low-rank form."""

    steps: int = 500
    learning_rate: float = 1e-4
    step_in_backward: bool = False
    rank: int = 4
    init: Literal["zero_up", "both_random"] = "zero_up"  # both_random: the second half is small, not zero


def setup(model: Model, s: DreamBoothLoRA, learner: Learner) -> None:
    """A residual on every projection of every attention."""
    for name, layer in attention_projections(model):
        learner.attach("unet", name, fresh_pair(layer, s.rank, s.init, learner.generator))
    train_text_encoders(model, s, learner)
    learner.add_subject_word(s)


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
