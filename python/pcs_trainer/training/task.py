"""What a run is asked to do (Task), and the photos and class images made ready for it (Prepared)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pcs_kernels

from ..data.batches import Bank, Subject, length_notes, prior_bank, subject_bank
from ..data.identity import data_digest, older_digest
from ..data.pictures import size_notes
from ..data.prompts import class_prompt, subject_prompt
from ..distributed import first_alone
from ..methods import method_named
from ..methods.method import Method
from ..model.autoencoder import own_size
from ..model.fingerprint import fingerprint
from ..model.model import Model
from ..model.upscaler import check_upscaler, level_labels
from ..settings import Settings
from ..units import Pace

Say = Callable[..., None]  # (kind, **data): an event of the run


@dataclass(frozen=True)
class Task:
    """What to learn, on what, by which settings, and where it is written (None: nowhere)."""

    model: Model
    settings: Settings
    subjects: tuple[Subject, ...]
    out: Path | None

    @property
    def method(self) -> Method:
        """The method that the settings name."""
        return method_named(self.settings.method)

    @property
    def prompt(self) -> str:
        """The first subject's own prompt."""
        return subject_prompt(self.settings)

    @property
    def class_prompts(self) -> list[str]:
        """Each subject's class in its class prompt."""
        return [class_prompt(subject.settings) for subject in self.subjects]


@dataclass(frozen=True)
class Prepared:
    """The data of a run as latents, and what identifies it and the base model."""

    size: int  # pixels a side
    bank: Bank
    names: list[str]  # of the bank's pictures
    prior: Bank | None
    digest: str
    older_digest: str  # of the same data, as version 0.1.0 wrote it
    base: str

    @property
    def prompts(self) -> list[str]:
        """Every prompt of the data."""
        return [*self.bank.every_prompt, *(self.prior.prompts if self.prior else [])]


def prepare(task: Task, say: Say) -> Prepared:
    """Photos to latents, class images drawn or read; then the autoencoder leaves memory.

    Args:
        task: what the run is asked to do.
        say: called with what a person should know: skipped pictures, what is being drawn.

    Raises:
        ValueError: the model does not fit the settings, or a picture cannot be used.
    """
    s, model, method = task.settings, task.model, task.method
    channels, wanted = model.unet.settings["in_channels"], model.vae.config.latent_channels
    upscaler = method.extra_input(s) is not None
    if upscaler:
        check_upscaler(model)
        level_labels(model, method.extra_input(s) or 0.0, 1)  # refused now where the UNet does not know the level
    elif channels != wanted:
        raise ValueError(
            f"{model.name} has a UNet of {channels} input channels; methods train on text-to-image models, or on "
            "up-scalers with stage='super_resolution' (DreamBooth and its low-rank forms)"
        )
    size = s.resolution or min(own_size(model))
    for subject in task.subjects:
        for text in [*(f"skipped: {reason}" for reason in subject.loaded.skipped), *subject.loaded.notes]:
            say("warning", text=text)
        for text in size_notes(subject.pictures, size):
            say("warning", text=text)
    for text in length_notes(model, task.subjects, method.augment(s) is not None):
        say("warning", text=text)
    bank, names = subject_bank(model, task.subjects, size, method.augment(s), upscaler)

    def report(text: Any) -> None:
        say("start", text=text)

    pace = Pace()

    def count(done: int, total: int) -> None:
        if done:  # the time left is known from the first step on
            left = pace.seconds_left(done, total)
            say("progress", label="class images", done=done, total=total, seconds_left=left)

    with first_alone("making the class images ready"):
        prior = prior_bank(model, task.subjects, s, size, report, count, upscaler)
    model.release("vae")
    pcs_kernels.forget_packed_weights()  # with them go the pages of what encoding has freed
    photos = sum(len(subject.pictures) for subject in task.subjects)
    say("start", text=f"{s.method}: {photos} pictures at {size} pixels, {task.prompt!r}, {s.steps} steps")
    digests = data_digest(task.subjects, prior), older_digest(task.subjects, prior)
    return Prepared(size, bank, names, prior, *digests, fingerprint(model))
