"""The report of one training run: photos, samples before and after, losses, attention, settings, checks."""

from __future__ import annotations

import csv
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..methods import TITLES, method_named
from ..training.log import SMOOTHING
from ..units import bytes_text, time_text
from ..version import own_version
from .page import write_report

if TYPE_CHECKING:
    from ..concept.concept import Concept
    from ..model.model import Model
    from ..training.trainer import Trainer

PLACES = ("", " on the beach", " in the snow", " at night")
STEPS = 25


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


def drawn(
    model: Model, concept: Concept | None, prompts: list[str], lag: bool = False, maps: bool = False, seed: int = 0
) -> Any:
    """`sample` with the report's number of steps."""
    from ..sampling.drawing import sample

    concepts = [concept] if concept else []
    return sample(model, prompts, concepts, steps=STEPS, lag=lag, seed=seed, return_maps=maps)


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
    folder: Path, model: Model, trainer: Trainer, concept: Concept, events: list[Any], seconds: float
) -> Path:
    """Sample with the base model and the concept, and write report.html of one run.

    Args:
        folder: output folder of the run.
        model: the model that was trained on.
        trainer: what trained.
        concept: what it returned.
        events: what it told.
        seconds: training time.
    """
    s, title = trainer.settings, TITLES[concept.method]
    subject = concept.subject_words
    sheet, attention = _samples(model, concept)
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
        "attention": attention,
        "curves": [{"name": title} | read_losses(folder)],
        "proof": [proof_of(title, events)],
        "timings": [{"name": "training", "seconds": seconds}],
        "settings": [{"name": title, "values": s.asdict()}],
        "environment": machine(model.unet.conv_in.weight.device.type),
    }
    return write_report(folder / "report.html", data)


def _samples(model: Model, concept: Concept) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report's "sheet" and "attention"."""
    prompts = [f"a photo of a {concept.subject_words}{place}" for place in PLACES]
    base = drawn(model, None, [f"a photo of a {concept.class_word}{place}" for place in PLACES])
    learned, maps = drawn(model, concept, prompts, maps=True)
    columns = {"Base model": base, TITLES[concept.method]: learned}
    if concept.method in TITLES and method_named(concept.method).lag:
        columns["with LAG"] = drawn(model, concept, prompts, lag=True)
    sheet = {
        "columns": list(columns),
        "rows": [{"prompt": p, "cells": [images[i] for images in columns.values()]} for i, p in enumerate(prompts)],
        "note": "The base model gets the same prompt without the learned token, and the same initial noise.",
    }
    attention = {
        "items": [
            {"label": prompt, "picture": learned[i], "maps": maps_of(maps, i, [concept.token])}
            for i, prompt in enumerate(prompts)
        ],
        "note": f"Cross-attention to {concept.token!r} at each position, from the first sampling step to the last.",
    }
    return sheet, attention
