"""What the quality benchmark trains and measures: its jobs by section, and the rows of results/quality.csv."""

from __future__ import annotations

import csv
import fcntl
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timing
from registry import measured

from pcs_trainer.methods import TITLES

RESULTS = timing.RESULTS / "quality.csv"
SUBJECTS = tuple(range(101, 151))  # seeds that no preset was chosen on
PR, LAG = "personalized_residuals", "personalized_residuals + LAG"  # the settings of its rows, plain and with LAG
NOT_MEASURED = {
    "textual_inversion": "the results hold no rows of it yet, and none of the papers' claims compared here is about it",
}
# The main table's rows.
SETTINGS = measured(("dreambooth", "dreambooth_lora", "custom_diffusion", PR, LAG, "textboost"), NOT_MEASURED)
METHODS = tuple(setting for setting in SETTINGS if setting != LAG)
NAMES = {setting: f"{TITLES[PR]} + LAG" if setting == LAG else TITLES[setting] for setting in SETTINGS}
PLACES = ("studio", "table", "meadow", "beach", "snow", "night", "brick", "underwater")
# What a prompt can ask for, by the names that the judge uses.
KINDS = ("background", "position", "size", "painting", "light")
KEY = ("model", "section", "setting", "subject")
FACTS = (*KEY, "method", "class", "photos", "train_seconds", "train_cpu_seconds", "steps")
MEASURES = (
    "gap_closed", "subject_similarity", "subject_similarity_base", "subject_similarity_real", "prompted_similarity",
    "prompt_kept", "prompt_accuracy", "prompt_accuracy_base", "text_similarity", "text_similarity_base",
    "image_similarity", "kid", "drift_to_subject", "drift_distance", "class_accuracy", "class_accuracy_base",
    "diversity", "parameters", "accuracy_background", "accuracy_background_base", "accuracy_position",
    "accuracy_position_base", "accuracy_size", "accuracy_size_base", "accuracy_painting", "accuracy_painting_base",
    "accuracy_light", "accuracy_light_base", "same_place", "seconds",
)  # fmt: skip
COLUMNS = (*FACTS, *MEASURES, "date", "commit", "device", "threads", "torch")
# TextBoost's ablations from one photo: setting -> (overrides, variant of variants.py).
FROM_ONE_PHOTO: dict[str, tuple[dict[str, Any], str]] = {
    "one photo": ({}, ""),
    "augmentation": ({"augment": True}, ""),
    "augmentation without words": ({"augment": True}, "untold"),
    "knowledge preservation": ({"preservation_weight": 0.1}, ""),
    "uniform timesteps": ({"timesteps": "uniform"}, ""),
}
Row = dict[str, str]


@dataclass(frozen=True)
class Job:
    """One training run, and what is measured on it."""

    section: str
    setting: str
    method: str
    subject: int
    overrides: dict[str, Any] = field(default_factory=dict, hash=False)
    photos: int = 4
    background: str = ""  # all photos in this one place
    lag: bool = False  # measured a second time, sampled with LAG
    variant: str = ""  # a change that no setting makes: a name in variants.py
    partner: int = 0  # a second subject, trained together with the first

    @property
    def settings(self) -> list[str]:
        """The settings of the rows it makes."""
        if self.partner:
            return ["joint", "merged"]
        return [self.setting, *([f"{self.setting} + LAG"] if self.lag else [])]


def sections(count: int) -> dict[str, list[Job]]:
    """Every section's jobs: the main table on `count` subjects, the ablations on the first four or six of them."""
    subjects = SUBJECTS[:count]
    few, fewer = subjects[:6], subjects[:4]
    return {
        "main": [Job("main", m, m, s, lag=m == PR) for s in subjects for m in METHODS],
        "entangled": [
            Job("entangled", PR, PR, s, background=PLACES[i % len(PLACES)], lag=True) for i, s in enumerate(few)
        ],
        "prior": [
            Job("prior", f"{m}, no prior loss", m, s, {"prior_weight": 0.0})
            for s in fewer
            for m in ("dreambooth", "dreambooth_lora")
        ],
        "custom": [
            Job("custom", what, "custom_diffusion", s, overrides)
            for s in fewer
            for what, overrides in (("no regularization", {"prior_weight": 0.0}), ("augmentation", {"augment": True}))
        ],
        "place": [Job("place", "low-rank keys and values", PR, s, variant="keys_and_values") for s in fewer],
        "rank": [Job("rank", f"rank {r}", PR, s, {"rank": r}) for s in fewer for r in (1, 24)],
        "textboost": [
            Job("textboost", name, "textboost", s, overrides, photos=1, variant=variant)
            for s in fewer
            for name, (overrides, variant) in FROM_ONE_PHOTO.items()
        ],
        "joint": [
            Job("joint", "joint", "custom_diffusion", a, {"steps": 0}, partner=b)
            for a, b in zip(fewer[::2], fewer[1::2], strict=True)
        ],
    }


class Store:
    """The rows of results/quality.csv for one set of weights; several processes may add to it."""

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.model = path, model
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[Row]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if row["model"] == self.model]

    def done(self) -> set[tuple[str, str, str]]:
        return {(r["section"], r["setting"], r["subject"]) for r in self.rows()}

    def add(self, row: Mapping[str, Any]) -> None:
        shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items() if k in COLUMNS}
        with self.path.open("a", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            writer = csv.DictWriter(file, COLUMNS, restval="")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(shown)
            file.flush()


def pending(jobs: Iterable[Job], done: set[tuple[str, str, str]]) -> list[Job]:
    """The jobs with a row missing."""

    def is_done(job: Job) -> bool:
        who = [job.subject, *([job.partner] if job.partner else [])]
        return all((job.section, setting, str(s)) in done for setting in job.settings for s in who)

    return [job for job in jobs if not is_done(job)]


def model_name() -> str:
    """A short hash of the embedded weights."""
    from pcs_trainer.tiny.common import WEIGHTS

    content = hashlib.sha256()
    for file in sorted(WEIGHTS.rglob("*.safetensors")):
        content.update(file.read_bytes())
    return content.hexdigest()[:10]
