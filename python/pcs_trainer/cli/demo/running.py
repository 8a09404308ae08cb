"""The demo's run: photos, then each method's training and images, then the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...methods import TITLES, method_named, settings_for
from ...report.run_report import maps_of, proof_of
from ..interrupt import Stopped
from ..progress import Progress, quiet_libraries
from . import DEFAULT_METHODS
from .report import write_demo_report
from .state import BASE, PROMPTS, Column, Demo, with_lag

if TYPE_CHECKING:
    from ...concept.concept import Concept
    from ...model.model import Model

EXAMPLE_SUBJECT = 300_000_013  # of the tiny world; the files in examples/photos show it
# Settings that --effort scales, and the least of each that still goes through every part of a run.
SCALED = {"steps": 2, "prior_images": 4, "bank": 8}


def run_demo(
    out: Path,
    photos: str | Path | None = None,
    class_word: str = "mug",
    effort: float = 1.0,
    methods: Sequence[str] = DEFAULT_METHODS,
    should_stop: Callable[[], bool] = lambda: False,
    quiet: bool = False,
) -> Demo:
    """Train every method on the photos, sample and measure, and write a report.

    Args:
        out: folder for everything that is made.
        photos: a folder of photos; None is the example mug.
        class_word: what they show.
        effort: share of the training steps and of the images.
        methods: names in TITLES.
        should_stop: asked between steps; what was made so far stays.
        quiet: no progress.

    Returns:
        The demo; `failures` names the parts that failed, and `report` is the page.
    """
    from ...machine import slow_note
    from ...model.model import load_model

    quiet_libraries()
    out.mkdir(parents=True, exist_ok=True)
    (out / "failures.txt").unlink(missing_ok=True)
    started = time.monotonic()
    with Progress("", quiet=quiet) as progress:
        demo = Demo(out, class_word, effort, progress, should_stop, methods)
        if note := slow_note("cpu"):
            progress.say(note)
        try:
            demo.photos = example_photos(photos)
            model = load_model("tiny")
            with demo.piece(BASE):
                demo.columns.append(sampled(demo, model, BASE))
            for method in methods:
                show_method(demo, method)
            with demo.piece("Report"):
                write_demo_report(demo, time.monotonic() - started)
        except Stopped:
            progress.say(f"stopped; what was learned so far is in {out}")
    return demo


def example_photos(photos: str | Path | None) -> list[Any]:
    """The user's photos, the examples' files or, where the package came without them, the same ones rendered."""
    from ...data.pictures import load_pictures

    folder = Path(photos) if photos else Path(__file__).parents[4] / "examples" / "photos"
    if photos or folder.is_dir():
        return [picture.pixels for picture in load_pictures(folder).pictures]
    from ...tiny.subjects import photos as rendered

    return [photo.picture for photo in rendered(EXAMPLE_SUBJECT, 4)]


def show_method(demo: Demo, method: str) -> None:
    """One method: training, its images, and the same with LAG where its paper uses that."""
    from ...model.model import load_model

    name = TITLES[method]
    model = load_model("tiny")
    learned: list[Concept] = []
    with demo.piece(f"{name}: training"):
        learned.append(trained(demo, model, method))
    if demo.should_stop():
        raise Stopped
    for concept in learned:  # none where the training failed
        with demo.piece(f"{name}: images"):
            demo.columns.append(sampled(demo, model, name, concept))
        if method_named(method).lag:
            with demo.piece(f"{with_lag(method)}: images"):
                demo.columns.append(sampled(demo, model, with_lag(method), concept, lag=True))


def trained(demo: Demo, model: Model, method: str) -> Concept:
    """The concept that a method learns from the demo's photos, scaled by its effort."""
    from ...training.trainer import Trainer

    preset = settings_for(model, method, class_word=demo.class_word).asdict()
    scaled = {name: max(least, round(preset[name] * demo.effort)) for name, least in SCALED.items() if name in preset}
    trainer = Trainer(model, method, demo.photos, demo.class_word, out=demo.out / method, **scaled)
    events: list[Any] = []

    def on_event(event: Any) -> None:
        events.append(event)
        if event.kind in ("step", "warning"):
            demo.progress(event)

    concept = trainer.train(on_event, demo.should_stop)
    demo.settings.append({"name": TITLES[method], "values": trainer.settings.asdict()})
    demo.proofs.append(proof_of(TITLES[method], events))
    return concept


def sampled(demo: Demo, model: Model, name: str, concept: Concept | None = None, lag: bool = False) -> Column:
    """Every prompt `each` times, all columns from the same initial noise; the maps are of the beach."""
    from ...sampling.drawing import sample

    subject = concept.subject_words if concept else demo.class_word
    prompts = [ask.prompt.format(subject) for ask in PROMPTS for _ in range(demo.each)]

    def on_step(step: int, steps: int, *_: object) -> bool:
        demo.progress.count(step + 1, steps)
        return not demo.should_stop()

    words = [
        w for w in (concept.token if concept else "", demo.class_word) if w and set(w.split()) <= {*subject.split()}
    ]
    pictures, maps = sample(
        model,
        prompts,
        [concept] if concept else [],
        steps=demo.sampling_steps,
        lag=lag,
        seed=1000,  # apart from the seeds of the class images and of the report, which count from 0
        on_step=on_step,
        return_maps=words,
    )
    return Column(name, pictures, maps_of(maps, demo.each, words), concept)
