"""The trainer: what to learn, from which pictures, by which method; `run.py` does it and proves that it was done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..concept.concept import Concept
from ..data.batches import Subject
from ..data.pictures import load_pictures
from ..data.prompts import choose_token
from ..distributed import join
from ..methods import Learner, add_words, setup, subject_rows
from ..model.model import Model, load_model
from ..settings import Settings, settings_for
from .events import Event
from .run import Run


class Trainer:
    """Learn a subject from a few pictures.

    images: a folder, or a list of files, PIL pictures or uint8 arrays; with `concepts` (dicts with images, class_word
    and token) several subjects are learned together. masks: a folder of masks of the pictures' names; without it a
    "-mask" file beside a picture is used. out: the folder for checkpoints, log, samples and the concept. overrides:
    any field of Settings.
    """

    def __init__(
        self, model: Model | str | Path, method: str = "personalized_residuals", images: Any = None,
        class_word: str = "", token: str = "", *, out: str | Path | None = None, masks: str | Path | None = None,
        concepts: list[dict[str, Any]] | None = None, **overrides: Any,
    ) -> None:  # fmt: skip
        self.model = load_model(model) if isinstance(model, (str, Path)) else model
        rank, _ = join()
        self.out = None if out is None else _writable(Path(out)) if rank == 0 else Path(out)
        given = concepts or [{"images": images, "class_word": class_word, "token": token}]
        if images is None and not concepts:
            raise ValueError("images is missing: give a folder of pictures, or a list of them")
        self.subjects = [self._subject(method, one, masks, overrides, number) for number, one in enumerate(given)]
        tokens = [subject.settings.token for subject in self.subjects]
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"the concepts share the token {tokens[0]!r}: give each a token of its own")
        self.settings: Settings = self.subjects[0].settings
        if len(tokens) > 1 and self.settings.variant.startswith("causal"):
            raise ValueError(
                f"textboost's variant {self.settings.variant!r} is made for one word; learn several subjects with "
                "variant='v1', or with custom_diffusion"
            )
        self._learner: Learner | None = None

    def _subject(self, method: str, one: dict[str, Any], masks: Any, overrides: dict[str, Any], number: int) -> Subject:
        chosen = {"class_word": one.get("class_word") or "", "token": one.get("token") or ""} | overrides
        s = settings_for(self.model, method, **chosen)
        if not s.class_word.strip() and s.identifier != "plain":
            raise ValueError("class_word is missing: one word for what the pictures show, such as 'dog' or 'mug'")
        s = replace(s, seed=s.seed + number)  # each has a rare word of its own, to be called by or to start from
        return Subject(load_pictures(one["images"], one.get("masks") or masks), choose_token(self.model, s))

    @property
    def learner(self) -> Learner:
        """What trains, put on the model when first asked for."""
        if self._learner is None:
            self._learner = setup(self.model, self.settings)
            for other in self.subjects[1:]:
                add_words(self._learner, subject_rows(self.model, other.settings), other.settings.train_token)
        return self._learner

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every tensor that trains, by the name that the concept file gives it."""
        return self.learner.parameters

    def train(
        self, on_event: Callable[[Event], Any] | None = None, should_stop: Callable[[], bool] | None = None,
        resume: bool = False,
    ) -> Concept:  # fmt: skip
        """Run all steps and return the concept. resume: go on from the last checkpoint in `out`."""
        run = Run(self, on_event or (lambda event: None), should_stop or (lambda: False))
        try:
            return run.train(resume)
        finally:
            if self._learner is not None:
                self._learner.restore()
                self._learner = None


def trainable(model: Model, method: str, class_word: str = "dog", token: str = "", **overrides: Any) -> dict[str, Any]:
    """name -> parameter of what a method trains on a model; works on the meta device, needs no picture."""
    chosen = settings_for(model, method, class_word=class_word, token=token, **overrides)
    learner = setup(model, choose_token(model, chosen))
    found = dict(learner.parameters)
    learner.restore()
    return found


def _writable(out: Path) -> Path:
    """The folder exists and takes a file, or one sentence now and not after the training."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"the out folder {out} cannot be written to ({error.strerror}); choose another") from None
    return out
