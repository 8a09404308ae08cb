"""LoRA-FA (arXiv 2308.03303): a low-rank residual W + B A whose A stays as it was drawn; B alone learns.

Trains   B [C_out, r] on to_q, to_k, to_v and to_out.0 of every attention; A [r, C_in] is frozen: half of LoRA's
         gradients and optimizer state a rank. The change of W stays in the span of A.
Init     A ~ N(0, 1 / r), B = 0.
Loss     DreamBooth's (eq. 2 of arXiv 2208.12242), with class images.
Default  rank 8, 2e-4, 500 steps of 1 + 1 pictures. The paper trains language models: these are DreamBooth-LoRA's
         values with twice the rank, for about as many trainable parameters, and twice the rate, for one moving half.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.model import Model
from .dreambooth import small_picture, without_prior
from .dreambooth_lora import DreamBoothLoRA, attention_projections, train_text_encoders
from .learner import Learner, Pair, fresh_pair
from .method import Method


@dataclass(kw_only=True)
class LoRAFA(DreamBoothLoRA):
    """DreamBooth-LoRA's settings with another rank and rate."""

    learning_rate: float = 2e-4
    rank: int = 8


def setup(model: Model, s: LoRAFA, learner: Learner) -> None:
    """A residual with a frozen first half on every projection of every attention."""
    for name, layer in attention_projections(model):
        down, up = fresh_pair(layer, s.rank, s.init, learner.generator)
        down.requires_grad_(False)
        learner.attach("unet", name, Pair(down, up))
    train_text_encoders(model, s, learner)
    learner.add_subject_word(s)


METHOD = Method(
    settings=LoRAFA,
    setup=setup,
    paper="https://arxiv.org/abs/2308.03303",
    trains="the second half of low-rank residuals on all attention projections",
    choose="DreamBooth-LoRA's files with half the optimizer state a rank",
    tiny={"steps": 450, "batch": 2, "learning_rate": 3e-3, "rank": 16, "prior_images": 32},
    extra_input=small_picture,
    implied=without_prior,
)
