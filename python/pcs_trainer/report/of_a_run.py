"""The report of one `pcs train`: photos, pictures before and after, losses, attention, settings, memory, the proof."""

from __future__ import annotations

import csv
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..units import bytes_text, time_text
from .page import write_report

if TYPE_CHECKING:
    from ..concept.concept import Concept
    from ..model.model import Model
    from ..training.trainer import Trainer

PLACES = ("", " on the beach", " in the snow", " at night")
STEPS = 25
METHOD_NAMES = {
    "dreambooth": "DreamBooth",
    "dreambooth_lora": "DreamBooth LoRA",
    "custom_diffusion": "Custom Diffusion",
    "personalized_residuals": "Personalized Residuals",
    "textboost": "TextBoost",
    "textual_inversion": "Textual Inversion",
}


def read_losses(folder: Path) -> dict[str, list[Any]]:
    """A run's logs/loss.csv as a curve of the report; smoothed parts are made here."""
    with (folder / "logs" / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    curve: dict[str, list[Any]] = {"steps": [int(row["step"]) for row in rows]}
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


def smooth(values: list[float], keep: float = 0.95) -> list[float]:
    result: list[float] = []
    for value in values:
        result.append(value if not result else keep * result[-1] + (1 - keep) * value)
    return result


def machine() -> dict[str, Any]:
    import torch

    import pcs_kernels

    from ..machine import kernels

    gpu, count = torch.cuda.is_available(), torch.get_num_threads()
    device = torch.cuda.get_device_name() if gpu else f"{processor()}, {count} thread{'s' * (count > 1)}"
    return {
        "device": device,
        "kernels": kernels()[0],
        "pcs": pcs_kernels.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }


def processor() -> str:
    """The processor's name, where the system says it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def proof_of(name: str, events: list[Any]) -> dict[str, Any]:
    """The proofs that a run gave; one that fails ends the run, so what is here has passed."""
    return {"name": name, "checks": [{"what": e.data["text"], "passed": True} for e in events if e.kind == "proof"]}


def drawn(
    model: Model, concept: Concept | None, prompts: list[str], lag: bool = False, maps: bool = False, seed: int = 0
) -> Any:
    from ..sampling.drawing import sample

    concepts = [concept] if concept else []
    return sample(model, prompts, concepts, steps=STEPS, lag=lag, seed=seed, return_maps=maps)


def maps_of(maps: Any, picture: int, words: list[str]) -> list[Any]:
    """The attention to the subject's words in one picture, a map for each sampling step."""
    chosen = [i for i, token in enumerate(maps.tokens) if token in words] or list(range(len(maps.tokens)))
    return [step[picture, chosen].float().sum(0).numpy() for step in maps.steps]


def write_run_report(
    folder: Path, model: Model, trainer: Trainer, concept: Concept, events: list[Any], seconds: float
) -> Path:
    """out/report.html of one run."""
    s = trainer.settings
    subject = " ".join(filter(None, (concept.token, concept.class_word)))
    prompts = [f"a photo of a {subject}{place}" for place in PLACES]
    plain = [f"a photo of a {concept.class_word}{place}" for place in PLACES]
    lag = concept.method == "personalized_residuals"
    base = drawn(model, None, plain)
    learned, maps = drawn(model, concept, prompts, maps=True)
    columns = {"Base model": base, METHOD_NAMES[s.method]: learned}
    if lag:
        columns["with LAG"] = drawn(model, concept, prompts, lag=True)
    rows = [{"prompt": p, "cells": [pictures[i] for pictures in columns.values()]} for i, p in enumerate(prompts)]
    photos = [picture.pixels for one in trainer.subjects for picture in one.loaded.pictures]
    file = folder / "concept.safetensors"
    return write_report(folder / "report.html", {
        "title": f"{METHOD_NAMES[s.method]}: {concept.class_word}",
        "lead": f"{len(photos)} photos, {concept.meta.get('steps', s.steps)} steps on {model.name}; the subject is "
        f"called {subject!r}.",
        "photos": photos,
        "sheet": {"columns": list(columns), "rows": rows, "note": "The base model draws the same prompt without the "
                  "learned word, from the same noise."},
        "numbers": {"columns": ["", ""], "rows": [
            ["numbers learned", f"{concept.parameters:,}"], ["size of the file", bytes_text(file.stat().st_size)],
            ["time to train", time_text(seconds)], ["prompt for the subject", concept.instance_prompt],
        ]},
        "attention": {"items": [
            {"label": prompts[i], "picture": learned[i], "maps": maps_of(maps, i, [concept.token])}
            for i in range(len(prompts))
        ], "note": f"How much each place looks at {concept.token!r}, from the first sampling step to the last."},
        "curves": [{"name": METHOD_NAMES[s.method]} | read_losses(folder)],
        "proof": [proof_of(METHOD_NAMES[s.method], events)],
        "timings": [{"name": "training", "seconds": seconds}],
        "settings": [{"name": METHOD_NAMES[s.method], "values": s.asdict()}],
        "environment": machine(),
    })  # fmt: skip
