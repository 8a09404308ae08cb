"""Personalized Residuals (arXiv 2405.12978): a low-rank offset on each block's output projection is the subject.

Trains   W' = W + A B on B.proj_out of every transformer, A [m, r], B [r, m], r = 0.05 m: 0.1 % of the model. Biases and
         all else stay; V* starts from a rare word's embedding and stays too (train_token=True trains it).
Init     B ~ N(0, 1 / r), A = 0; init="both_random" as the paper words it.
Loss     plain noise MSE on "a photo of a V* [class]"; no class images are needed.
Default  150 steps, batch 4, AdamW, 1e-3.
Drawing  sample(..., lag=True): f = (1 - M) W x + M W' x with M from the block's own attention to V* and the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..model.model import Model
from ..settings import Settings
from .learner import Learner, fresh_pair
from .method import Method

RANK_SHARE = 0.05  # rank of a residual as a part of its projection's width (section 4)


@dataclass(kw_only=True)
class Residuals(Settings):
    """The paper's values are Settings' own defaults."""

    rank: int | None = None  # None: RANK_SHARE of each projection's width
    init: Literal["zero_up", "both_random"] = "zero_up"  # both_random: the second half is small, not zero


def setup(model: Model, s: Residuals, learner: Learner) -> None:
    """A residual on every transformer's output projection."""
    projections = {n: layer for n, layer in model.unet.named_modules() if n.endswith(".proj_out")}
    if not projections:
        raise ValueError(f"{model.name} has no transformer in its UNet, so there is no proj_out to learn residuals on")
    for name, layer in projections.items():
        rank = s.rank or max(1, round(RANK_SHARE * layer.weight.shape[0]))
        learner.attach("unet", name, fresh_pair(layer, rank, s.init, learner.generator))
    learner.add_subject_word(s)


METHOD = Method(
    settings=Residuals,
    setup=setup,
    paper="https://arxiv.org/abs/2405.12978",
    trains="a low-rank offset on each block's output projection",
    choose="the default: small and quick, no class images; with LAG it changes the subject's pixels alone",
    lag=True,
    tiny={"steps": 500, "learning_rate": 8e-3, "rank": 8},
)
