"""Textual Inversion (arXiv 2208.01618): the row of a new word is all that trains.

Loss     plain noise MSE on "a photo of a V*"; V* starts from the class word.
Default  1000 steps, batch 4, 5e-3, no weight decay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import Learner, add_words, subject_rows

if TYPE_CHECKING:
    from ..model.model import Model
    from ..settings import Settings


def setup(model: Model, s: Settings) -> Learner:
    if s.identifier != "learned":
        raise ValueError(f"textual_inversion learns a word: identifier must be 'learned', not {s.identifier!r}")
    learner = Learner({}, lambda: {})
    add_words(learner, subject_rows(model, s), train=True)
    return learner
