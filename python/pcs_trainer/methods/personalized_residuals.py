"""Personalized Residuals (arXiv 2405.12978): a low-rank offset on each block's output projection is the subject.

Trains   W' = W + A B on B.proj_out of every transformer, A [m, r], B [r, m], r = 0.05 m: 0.1 % of the model. Biases and
         all else stay; V* starts from a rare word's row and stays too (train_token=True trains it).
Init     B ~ N(0, 1 / r), A = 0; init="both_random" as the paper words it.
Loss     plain noise MSE on "a photo of a V* [class]"; no pictures of the class are needed.
Default  150 steps, batch 4, AdamW, 1e-3.
Drawing  sample(..., lag=True): f = (1 - M) W x + M W' x with M from the block's own attention to V* and the class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..unet.layers import LowRank
from . import Learner, add_words, subject_rows
from .dreambooth import fresh_pair

if TYPE_CHECKING:
    from ..model.model import Model
    from ..settings import Settings

SHARE = 0.05  # of a projection's width: the rank


def setup(model: Model, s: Settings) -> Learner:
    learner = Learner({}, lambda: {})
    generator = torch.Generator().manual_seed(s.seed)
    pairs = {}
    for name, layer in model.unet.named_modules():
        if name.endswith(".proj_out"):
            rank = s.rank or max(1, round(SHARE * layer.weight.shape[0]))
            down, up = fresh_pair(layer, rank, s.init, generator)
            model.unet.attach(name, LowRank(down, up, key="learning"))
            pairs |= {f"unet.{name}.down": down, f"unet.{name}.up": up}
    if not pairs:
        raise ValueError(f"{model.name} has no transformer in its UNet, so there is no proj_out to learn residuals on")
    learner.parameters |= pairs
    learner.undo.append(lambda: model.unet.detach("learning"))
    add_words(learner, subject_rows(model, s), s.train_token)
    learner.tensors = lambda: {n: p.detach().clone() for n, p in pairs.items()}
    return learner
