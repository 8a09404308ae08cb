"""The report of one training run: photos, samples before and after, losses, attention, settings, checks."""

from __future__ import annotations

import csv
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..concept.attach import in_place
from ..methods import TITLES, method_named
from ..training.log import SMOOTHING
from ..units import Pace, bytes_text, time_text
from ..version import own_version
from .page import write_report

if TYPE_CHECKING:
    from ..concept.concept import Concept
    from ..model.model import Model
    from ..training.trainer import Trainer

PLACES = ("", " on the beach", " in the snow", " at night")
# dpmpp_2m shows in 15 steps what ddim does in 25 or more: a second-order solver.
SAMPLER, STEPS = "dpmpp_2m", 15
PHOTOS = 4  # at most, that an up-scaler's report enlarges


Tell = Callable[..., Any]  # (done, total, label, seconds_left=...)


def _nobody(*_: Any, **_data: Any) -> None:
    """Nobody is told."""


def read_losses(folder: Path) -> dict[str, Any]:
    """The curve of a run for the report, from logs/loss.csv and logs/probe.csv of its folder."""
    with (folder / "logs" / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    curve: dict[str, Any] = {"steps": [int(row["step"]) for row in rows]}
    for key in ("loss", "smoothed", "subject", "prior"):
        values = [float(row[key]) for row in rows if row.get(key)]
        if len(values) == len(rows):
            curve[key] = values if key in ("loss", "smoothed") else smooth(values)
    if "prior" not in curve:
        curve.pop("subject", None)  # it is the loss itself
    probes = folder / "logs" / "probe.csv"
    if probes.is_file():
        with probes.open(newline="") as file:
            seen = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        curve["probe"] = {key: [row[key] for row in seen] for key in ("step", "held_out", "drift")}
    return curve


def smooth(values: list[float], keep: float = SMOOTHING) -> list[float]:
    """The exponential moving average of the values."""
    result: list[float] = []
    for value in values:
        result.append(value if not result else keep * result[-1] + (1 - keep) * value)
    return result


def machine(kind: str = "") -> dict[str, Any]:
    """What the run used, for the report's "environment".

    Args:
        kind: of the model's device; default: the GPU where there is one, else the CPU.
    """
    import torch

    from ..machine import device_name, kernels

    kind, count = kind or ("cuda" if torch.cuda.is_available() else "cpu"), torch.get_num_threads()
    device = f"{processor()}, {count} thread{'s' * (count > 1)}" if kind == "cpu" else device_name(kind)
    return {
        "device": device,
        "kernels": kernels(kind)[0],
        "pcs": own_version(),
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }


def processor() -> str:
    """The CPU's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def proof_of(name: str, events: list[Any]) -> dict[str, Any]:
    """The checks of a run for the report; one that fails ends the run, so all of them have passed."""
    return {"name": name, "checks": [{"what": e.data["text"], "passed": True} for e in events if e.kind == "proof"]}


@dataclass
class Drawer:
    """`sample` as the report uses it: few steps at the size of the training, and told how far it is."""

    model: Model
    size: int
    tell: Tell
    total: int  # columns of images
    done: int = 0

    def __post_init__(self) -> None:
        self.pace = Pace()

    def __call__(self, concept: Concept | None, prompts: list[str], lag: bool = False, maps: bool = False) -> Any:
        """A column of images, and with `maps` the attention maps."""
        from ..sampling.drawing import pictures_at_once, sample

        def on_step(step: int, steps: int, _: Any) -> None:
            done, total = self.done * steps + step, self.total * steps
            if done:  # the time left is known from the first step on
                self.tell(done, total, "report", seconds_left=self.pace.seconds_left(done, total))

        found = sample(
            self.model,
            prompts,
            [concept] if concept else [],
            sampler=SAMPLER,
            steps=STEPS,
            size=self.size,
            lag=lag,
            return_maps=maps,
            batch=pictures_at_once(self.model, self.size),
            on_step=on_step,
        )
        self.done += 1
        return found


def maps_of(maps: Any, picture: int, words: list[str]) -> list[Any]:
    """The attention to some words in one image.

    Args:
        maps: what `sample(..., return_maps=True)` returned beside the images.
        picture: number of the image.
        words: tokens whose attention is summed; all where the prompt holds none of them.

    Returns:
        One array [h, w] for each sampling step.
    """
    chosen = [i for i, token in enumerate(maps.tokens) if token in words] or list(range(len(maps.tokens)))
    return [step[picture, chosen].float().sum(0).numpy() for step in maps.steps]


def write_run_report(
    folder: Path,
    model: Model,
    trainer: Trainer,
    concept: Concept,
    events: list[Any],
    seconds: float,
    tell: Tell = _nobody,
) -> Path:
    """Sample with the base model and the concept, and write report.html of one run.

    Args:
        folder: output folder of the run.
        model: the model that was trained on.
        trainer: what trained.
        concept: what it returned.
        events: what it told.
        seconds: training time.
        tell: called as tell(done, total, label, seconds_left=...) while images are drawn.
    """
    s, title = trainer.settings, TITLES[concept.method]
    subject = concept.subject_words
    if model.upscales:
        sheet, attention = _enlarged(model, concept, trainer), None
    else:
        sheet, attention = _samples(model, concept, _size(model, trainer), tell)
    photos = [picture.pixels for one in trainer.subjects for picture in one.loaded.pictures]
    steps = concept.meta.get("steps", s.steps)
    data = {
        "title": f"{title}: {concept.class_word}",
        "lead": f"{len(photos)} photos, {steps} steps on {model.name}. Prompts call the subject {subject!r}.",
        "photos": photos,
        "sheet": sheet,
        "numbers": {
            "columns": ["", ""],
            "rows": [
                ["trainable parameters", f"{concept.parameters:,}"],
                ["file size", bytes_text((folder / "concept.safetensors").stat().st_size)],
                ["training time", time_text(seconds)],
                ["subject prompt", concept.instance_prompt],
            ],
        },
        **({"attention": attention} if attention else {}),
        "curves": [{"name": title} | read_losses(folder)],
        "proof": [proof_of(title, events)],
        "timings": [{"name": "training", "seconds": seconds}],
        "settings": [{"name": title, "values": s.asdict()}],
        "environment": machine(model.unet.conv_in.weight.device.type),
    }
    return write_report(folder / "report.html", data)


def _size(model: Model, trainer: Trainer) -> int:
    """Pixels a side that the run trained at."""
    from ..model.autoencoder import own_size

    return trainer.settings.resolution or min(own_size(model))


def _enlarged(model: Model, concept: Concept, trainer: Trainer) -> dict[str, Any]:
    """The report's "sheet" of an up-scaler: photos reduced, and enlarged again without and with the concept."""
    from ..data.pictures import fitted
    from ..model.autoencoder import latent_factor
    from ..sampling.upscaling import noise_for, upscale

    size = _size(model, trainer)
    photos = [fitted(p.pixels, size) for p in trainer.subjects[0].pictures[:PHOTOS]]
    small = [fitted(p, size // latent_factor(model)) for p in photos]
    prompt, noise = concept.instance_prompt, noise_for(model, [concept])
    plain = prompt.replace(concept.subject_words, concept.class_word)
    base = upscale(model, small, plain, steps=STEPS, noise_level=noise)
    learned = upscale(model, small, prompt, concept, steps=STEPS)
    columns: dict[str, list[Any]] = {
        "Photo": photos,
        "Reduced": small,
        "Base model": base,
        TITLES[concept.method]: learned,
    }
    rows = [{"prompt": f"photo {i + 1}", "cells": [c[i] for c in columns.values()]} for i in range(len(photos))]
    return {
        "columns": list(columns),
        "rows": rows,
        "note": "Both enlarge the same reduced photo from the same initial noise.",
    }


def _samples(model: Model, concept: Concept, size: int, tell: Tell) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report's "sheet" and "attention"."""
    lag = concept.method in TITLES and method_named(concept.method).lag
    drawn = Drawer(model, size, tell, total=2 + lag)
    prompts = [f"a photo of a {concept.subject_words}{place}" for place in PLACES]
    classes = " and ".join(word for _, word in concept.subjects if word)
    tokens = [token for token, _ in concept.subjects if token]
    base = drawn(None, [f"a photo of a {classes}{place}" for place in PLACES])
    with in_place(model, concept) as rest:  # a whole network takes the base's place, not a second one's room
        learned, maps = drawn(rest, prompts, maps=True)
    columns = {"Base model": base, TITLES[concept.method]: learned}
    if lag:
        columns["with LAG"] = drawn(concept, prompts, lag=True)
    sheet = {
        "columns": list(columns),
        "rows": [{"prompt": p, "cells": [images[i] for images in columns.values()]} for i, p in enumerate(prompts)],
        "note": "The base model gets the same prompt without the learned token, and the same initial noise.",
    }
    attention = {
        "items": [
            {"label": prompt, "picture": learned[i], "maps": maps_of(maps, i, tokens)}
            for i, prompt in enumerate(prompts)
        ],
        "note": f"Cross-attention to {' and '.join(map(repr, tokens))} at each position, from the first sampling step "
        "to the last.",
    }
    return sheet, attention
