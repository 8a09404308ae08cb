"""Textual Inversion (arXiv 2208.01618): the embedding of a new word is all that trains.

Loss     plain noise MSE on "a photo of V*" and twenty such prompts, drawn for each picture; V* starts from the class
         word, which the prompts do not say.
Default  1000 steps, batch 4, 5e-3, no weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.model import Model
from ..settings import Settings
from .learner import Learner
from .method import Method
from .templates import PHOTOS


@dataclass(kw_only=True)
class TextualInversion(Settings):
    """The paper's values."""

    train_token: bool = True
    init_word: str | None = "{class}"
    template: str | tuple[str, ...] = PHOTOS
    steps: int = 1000
    batch: int = 4
    learning_rate: float = 5e-3
    weight_decay: float = 0.0

    def check(self) -> None:
        """Refuse a run in which nothing would train."""
        super().check()
        if self.identifier != "learned":
            raise ValueError(f"textual_inversion learns a word: identifier must be 'learned', not {self.identifier!r}")
        if not self.train_token:
            raise ValueError("textual_inversion trains its word and nothing else: train_token must be true")
        if self.prior_weight:
            raise ValueError(
                "the prior loss has no gradient in textual_inversion, whose word stands in no prompt of the class. "
                "Fix: leave out prior and prior_weight"
            )


def setup(_model: Model, s: TextualInversion, learner: Learner) -> None:
    """The subject's word."""
    learner.add_subject_word(s)


METHOD = Method(
    settings=TextualInversion,
    setup=setup,
    paper="https://arxiv.org/abs/2208.01618",
    trains="the embedding of a new word alone",
    choose="the smallest file there is",
    # The other three were chosen with this prompt, and docs/quality.md was measured with it.
    tiny={"steps": 300, "batch": 8, "learning_rate": 2e-2, "template": "a photo of a {subject}"},
)
