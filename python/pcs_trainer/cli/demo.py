"""pcs demo: one subject, four photos, four methods on the embedded model; pictures, numbers and a report of it all."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.prompts import Ask
from ..evaluation.scores import accuracy, similarities
from ..files import written_text
from ..report.of_a_run import METHOD_NAMES, machine, maps_of, proof_of, read_losses
from ..report.page import write_report
from ..report.sheets import attention_sheet, contact_sheet, loss_curves, save_picture
from ..units import bytes_text, time_text
from .interrupt import Stopped
from .progress import Progress, quiet_libraries

if TYPE_CHECKING:
    from ..concept.concept import Concept
    from ..model.model import Model

EXAMPLE_SUBJECT = 300_000_013  # of the tiny world; the files in examples/photos show it
METHODS = ("dreambooth", "custom_diffusion", "personalized_residuals", "textboost")
BASE, WITH_LAG = "Base model", "Personalized Residuals with LAG"
# What is drawn, and what has to be seen in it.
PROMPTS = (
    Ask("a photo of a {}", "plain"),
    Ask("a {} on the beach", "background", (("background", "beach"),)),
    Ask("a {} underwater", "background", (("background", "underwater"),)),
    Ask("a {} in the snow", "background", (("background", "snow"),)),
    Ask("a {} in front of a brick wall", "background", (("background", "brick"),)),
    Ask("a painting of a {} at night", "painting", (("background", "night"), ("style", "painting"))),
)
TRAINS = {
    "dreambooth": "the whole UNet",
    "custom_diffusion": "keys and values of the text, a word",
    "personalized_residuals": "a low-rank offset on each output projection",
    "textboost": "low-rank offsets on the text, a word",
}


@dataclass
class Column:
    """One model's pictures: `each` of every prompt, prompt by prompt, and the attention in one of them."""

    name: str
    pictures: list[Any]
    maps: list[Any]
    concept: Concept | None = None


@dataclass
class Demo:
    """What the demo has made so far."""

    out: Path
    class_word: str
    effort: float
    progress: Progress
    should_stop: Callable[[], bool]
    photos: list[Any] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    proofs: list[dict[str, Any]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    report: Path = Path()

    @property
    def each(self) -> int:
        """Pictures of each prompt, for the numbers."""
        return max(1, round(4 * self.effort))

    @property
    def sampling_steps(self) -> int:
        return 25 if self.effort >= 0.3 else 8

    @contextmanager
    def piece(self, name: str) -> Iterator[None]:
        """A part of the demo, timed; one that fails is named and the rest goes on."""
        if self.should_stop():
            raise Stopped
        self.progress.label = name
        started = time.monotonic()
        try:
            yield
        except (Stopped, KeyboardInterrupt):
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self.failures.append(f"{name} failed: {reason}")
            self.progress.say(f"{name} failed: {reason}")
            with (self.out / "failures.txt").open("a", encoding="utf-8") as log:
                log.write(f"{name}\n{traceback.format_exc()}\n")
        finally:
            seconds = time.monotonic() - started
            self.timings.append({"name": name, "seconds": seconds})
        self.progress.say(f"{name}: {time_text(seconds)}")


def example_photos(photos: str | Path | None) -> list[Any]:
    """The user's photos, the examples' files, or (where the package is installed without them) the same ones drawn."""
    from ..data.pictures import load_pictures

    folder = Path(photos) if photos else Path(__file__).parents[3] / "examples" / "photos"
    if photos or folder.is_dir():
        return [picture.pixels for picture in load_pictures(folder).pictures]
    from ..tiny.subjects import photos as drawn

    return [photo.picture for photo in drawn(EXAMPLE_SUBJECT, 4)]


def run_demo(
    out: Path,
    photos: str | Path | None = None,
    class_word: str = "mug",
    effort: float = 1.0,
    should_stop: Callable[[], bool] = lambda: False,
    quiet: bool = False,
) -> Demo:
    """Everything, into `out`; the result names what failed."""
    from ..machine import slow_note
    from ..model.model import load_model

    quiet_libraries()
    out.mkdir(parents=True, exist_ok=True)
    (out / "failures.txt").unlink(missing_ok=True)
    started = time.monotonic()
    with Progress("", quiet=quiet) as progress:
        demo = Demo(out, class_word, effort, progress, should_stop)
        if note := slow_note():
            progress.say(note)
        try:
            demo.photos = example_photos(photos)
            model = load_model("tiny")
            with demo.piece(BASE):
                demo.columns.append(draw(demo, model, BASE))
            for number, method in enumerate(METHODS):
                learn(demo, method, number)
            with demo.piece("Report"):
                finish(demo, time.monotonic() - started)
        except Stopped:
            progress.say("stopped; what was learned so far is in " + str(out))
    return demo


def learn(demo: Demo, method: str, number: int) -> None:
    """One method: training, pictures, and for Personalized Residuals the same with LAG."""
    from ..methods import settings_for
    from ..model.model import load_model
    from ..training.trainer import Trainer

    name = METHOD_NAMES[method]
    concept: Concept | None = None
    model = load_model("tiny")
    with demo.piece(f"{name}: training"):
        preset = settings_for(model, method, class_word=demo.class_word)
        scaled = {key: max(least, round(getattr(preset, key) * demo.effort)) for key, least in
                  (("steps", 2), ("prior_images", 4), ("bank", 8))}  # fmt: skip
        if method == "dreambooth":
            scaled["batch"] = min(preset.batch, 4)
        trainer = Trainer(model, method, demo.photos, demo.class_word, out=demo.out / method, **scaled)
        events: list[Any] = []

        def on_event(event: Any) -> None:
            events.append(event)
            if event.kind in ("step", "warning"):
                demo.progress(event)

        concept = trainer.train(on_event, demo.should_stop)
        demo.settings.append({"name": name, "values": trainer.settings.asdict()})
        demo.proofs.append(proof_of(name, events))
    if demo.should_stop():
        raise Stopped
    if concept is None:
        return
    with demo.piece(f"{name}: pictures"):
        demo.columns.append(draw(demo, model, name, concept))
    if method == "personalized_residuals":
        with demo.piece(f"{WITH_LAG}: pictures"):
            demo.columns.append(draw(demo, model, WITH_LAG, concept, lag=True))


def draw(demo: Demo, model: Model, name: str, concept: Concept | None = None, lag: bool = False) -> Column:
    """Every prompt `each` times, all columns from the same noise; the maps are of the beach."""
    from ..sampling.drawing import sample

    subject = " ".join(filter(None, (concept.token, concept.class_word))) if concept else demo.class_word
    prompts = [ask.prompt.format(subject) for ask in PROMPTS for _ in range(demo.each)]

    def on_step(step: int, steps: int, latents: Any) -> bool:
        demo.progress.count(step + 1, steps)
        return not demo.should_stop()

    words = [w for w in (concept.token if concept else "", demo.class_word) if w]
    pictures, maps = sample(
        model, prompts, [concept] if concept else [], steps=demo.sampling_steps, lag=lag, seed=1000,
        on_step=on_step, return_maps=words,
    )  # fmt: skip
    return Column(name, pictures, maps_of(maps, demo.each, words), concept)


def measure(demo: Demo) -> dict[str, Any]:
    """The judge's table: likeness to the photos, and what the prompts asked for and it finds."""
    from ..evaluation.image_encoders import JudgeEncoder
    from ..tiny.world import CLASSES

    judge, photos = JudgeEncoder(), [small(p) for p in demo.photos]
    kind = (("kind", demo.class_word),) if demo.class_word in CLASSES else ()
    asks = [replace(ask, shows=ask.shows + kind) for ask in PROMPTS for _ in range(demo.each)]
    rows, real = [], 1.0
    for column in demo.columns:
        drawn = [small(p) for p in column.pictures]
        alike = similarities(judge, drawn, photos)
        real = alike.get("subject_similarity_real") or real
        seconds = [t["seconds"] for t in demo.timings if t["name"] == f"{column.name}: training"]
        method = column.concept.method if column.concept else ""
        file = demo.out / method / "concept.safetensors"
        rows.append([
            column.name, TRAINS.get(method, "–"), column.concept.parameters if column.concept else "–",
            time_text(seconds[0]) if seconds else "–", bytes_text(file.stat().st_size) if method else "–",
            f"{alike['subject_similarity']:.2f}", f"{accuracy(judge, asks, drawn)['all']:.0%}",
        ])  # fmt: skip
    columns = ["", "trains", "numbers learned", "time", "file", "likeness", "prompts right"]
    note = (
        f"Likeness: cosine of a picture and a photo in the judge's subject space, the mean over all pairs; the photos "
        f"among themselves have {real:.2f}. Prompts right: the share of objects, places and styles asked for that "
        "the judge finds. The judge is a small network trained apart from the model."
    )
    return {"columns": columns, "rows": rows, "note": note}


def small(picture: Any) -> Any:
    """A picture as the judge takes it: uint8 [64, 64, 3]."""
    import numpy as np
    from PIL import Image

    shown = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    return np.asarray(shown.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC))


def memory_of(demo: Demo) -> list[dict[str, Any]]:
    """What a step of each method held, counted part by part."""
    import torch

    from ..memory.planner import plan

    found = []
    for column in demo.columns:
        values = next((s["values"] for s in demo.settings if s["name"] == column.name), None)
        if values and column.concept:
            counted = plan(
                "tiny", column.concept.method, batch=values["batch"], dtype=torch.float32, device="cpu", accumulate=1
            )
            found.append({"name": column.name, "parts": counted.components})
    return found


def finish(demo: Demo, seconds: float) -> None:
    """The files of the demo and its report."""
    curves = []
    for column in demo.columns:
        if column.concept and column.name != WITH_LAG:
            curves.append({"name": column.name} | read_losses(demo.out / column.concept.method))
    items = [
        {"label": column.name, "picture": column.pictures[demo.each], "maps": column.maps} for column in demo.columns
    ]
    prompts = [ask.prompt.format("…") for ask in PROMPTS]
    firsts = {column.name: column.pictures[:: demo.each] for column in demo.columns}
    numbers = measure(demo)
    save_picture(contact_sheet(demo.photos, firsts, prompts), demo.out / "contact_sheet.png")
    save_picture(attention_sheet(items), demo.out / "attention.png")
    if curves:
        save_picture(loss_curves(curves), demo.out / "loss_curves.png")
    facts = {"numbers": numbers, "timings": demo.timings, "failures": demo.failures}
    written_text(demo.out / "numbers.json", json.dumps(facts, indent=1))
    rows = [{"prompt": p, "cells": [f[i] for f in firsts.values()]} for i, p in enumerate(prompts)]
    demo.report = write_report(demo.out / "report.html", {
        "title": f"Four ways to learn a {demo.class_word}",
        "lead": f"{len(demo.photos)} photos, four methods, the embedded model. Everything below was made by one run of "
        f"pcs demo in {time_text(seconds)}.",
        "photos": demo.photos,
        "sheet": {"columns": list(firsts), "rows": rows, "note": "All columns start from the same noise; … stands for "
                  "the subject's learned word and the class, and for the base model for the class alone."},
        "numbers": numbers,
        "attention": {"items": items, "note": f"How much each place looks at the words that name the subject, in the "
                      f"prompt {prompts[1]!r}, from the first sampling step to the last."},
        "curves": curves, "proof": demo.proofs, "timings": demo.timings, "memory": memory_of(demo),
        "settings": demo.settings, "environment": machine(), "failures": demo.failures,
    })  # fmt: skip
