"""What a person does with a method, from photos to exports: the words after `pcs`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from pcs_trainer.methods import method_named

from benchmarks.real.meter import ROOT

PHOTOS = ROOT / "examples" / "photos"


def few_class_images(method: str) -> dict[str, int]:
    """Two class images of two steps where a preset draws a hundred: hours on a CPU, and the same code."""
    settings = method_named(method).settings
    weight = next(field.default for field in fields(settings) if field.name == "prior_weight")
    return {"prior_images": 2, "prior_steps": 2} if weight else {}


def commands(method: str, model: Path, out: Path, steps: int, size: int) -> Iterator[tuple[str, list[str]]]:
    """(what the row says, the words) of each command; each begins where the last one has ended."""
    concept, model_flags = str(out / "run"), ["--model", str(model)]
    few = [word for name, value in few_class_images(method).items() for word in ("--set", f"{name}={value}")]
    learn = ["train", str(PHOTOS), "--class", "mug", "--method", method, *model_flags, "--out", concept, *few]
    learn += ["--resolution", str(size), "--no-report", "--dtype", "bfloat16"]
    yield "train", [*learn, "--steps", str(steps)]
    yield "resume", [*learn, "--steps", str(steps + 5), "--resume"]
    drawing = ["--steps", "4", "--height", str(size), "--width", str(size), "--out", str(out / "pictures")]
    yield "sample", ["sample", "a photo of {} on the beach", "--concept", concept, *model_flags, *drawing]
    for name in ("diffusers", "kohya", "pipeline"):
        target = str(out / f"export-{name}")
        yield f"export {name}", ["export", concept, "--format", name, *model_flags, "--out", target]
    files = sorted((out / "export-kohya").glob("*.safetensors"))
    if files:
        target = str(out / "imported")
        yield "import kohya", ["export", str(files[0]), "--format", "concept", *model_flags, "--out", target]
