"""pcs evaluate: how like the photos and how true to the prompts the pictures of a concept are."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ..cli_options import Command, Option, UsageError, number, whole
from ..interrupt import INTERRUPTED, Interrupt
from ..progress import Progress
from .common import MODEL_FLAGS, TRANSLATE, concept_file, open_concept, open_model, subject_of

OPTIONS = (
    Option("concept", "a run's folder or a concept's file", metavar="CONCEPT", group="words"),
    Option("--photos", "what it was learned from", metavar="FOLDER", also=("--instance_data_dir",), group="evaluation"),
    Option("--count", "pictures of each prompt", whole(1, "4"), 4, "N", group="evaluation"),
    Option("--steps", "denoising steps", whole(1, "25"), 25, "N", also=("--num_inference_steps",), group="evaluation"),
    Option("--guidance", "strength of the prompt; none is the model's own", number(0, example="5"), metavar="X",
           group="evaluation"),
    Option("--lag", "draw with LAG sampling", None, False, group="evaluation"),
    Option("--seed", "of the noise", whole(0, "0"), 0, "N", group="evaluation"),
    *MODEL_FLAGS,
    Option("--out", "write the numbers into this JSON file too", metavar="FILE", group="output"),
    Option("--quiet", "print the numbers alone", None, False, group="output"),
)  # fmt: skip

EXAMPLES = (
    ("pcs evaluate out/mug --photos examples/photos", "likeness and prompts right, beside the base model's"),
    ("pcs evaluate out/mug --photos examples/photos --lag --count 8 --out out/mug/evaluation.json",
     "with LAG, from more pictures, the numbers in a file"),
)  # fmt: skip


def run(options: argparse.Namespace) -> int:
    if len(options.concept or []) != 1:
        raise UsageError("pcs evaluate needs one concept: pcs evaluate out/mug --photos examples/photos")
    if not options.photos:
        raise UsageError("--photos is missing: the folder of the photos that the concept was learned from")
    if not Path(options.photos).exists():
        raise UsageError(f"--photos: {options.photos} does not exist; give the folder the concept was learned from")
    concept_file(options.concept[0])
    with Interrupt("stopping after this step; press again to leave at once") as stop:
        return evaluate(options, stop)


def evaluate(options: argparse.Namespace, stop: Interrupt) -> int:
    from ..images import load_pictures
    from ..judging import PROMPTS, judged
    from ..sampling import sample

    model = open_model(options)
    if not model.embedded:
        raise UsageError("pcs evaluate measures with the embedded model's judge, which knows that model's world alone")
    concept = open_concept(options.concept[0], model)
    photos = [picture.pixels for picture in load_pictures(options.photos).pictures]
    truths = [truth for _, truth in PROMPTS for _ in range(options.count)]
    result: dict[str, Any] = {"pictures": len(truths), "seed": options.seed, "lag": options.lag}
    with Progress("drawing", quiet=options.quiet) as progress:
        for name, concepts, subject in (
            ("base", [], concept.class_word),
            ("concept", [concept], subject_of([concept])),
        ):
            progress.label = f"drawing with the {name}"

            def on_step(step: int, steps: int, latents: Any) -> bool:
                progress.count(step + 1, steps)
                return not stop()

            prompts = [text.format(subject) for text, _ in PROMPTS for _ in range(options.count)]
            pictures = sample(model, prompts, concepts, steps=options.steps, guidance=options.guidance,
                              seed=options.seed, lag=options.lag and bool(concepts), on_step=on_step)  # fmt: skip
            if stop():
                return INTERRUPTED
            verdict = judged(photos, pictures, truths, concept.class_word)
            result[name] = {"likeness": verdict.likeness, "prompts_right": verdict.accuracy}
            result["photos_among_themselves"] = verdict.photos
    show(result)
    if options.out:
        path = Path(options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(result, indent=1))
        os.replace(part, path)
    return 0


def show(result: dict[str, Any]) -> None:
    print(f"{'':<26}{'likeness':>10}{'prompts right':>16}")
    print(f"{'photos among themselves':<26}{result['photos_among_themselves']:>10.2f}")
    for name in ("base", "concept"):
        print(f"{name:<26}{result[name]['likeness']:>10.2f}{result[name]['prompts_right']:>16.0%}")


COMMAND = Command(
    name="evaluate",
    about="how like the photos and how true to the prompts the pictures are",
    options=OPTIONS,
    examples=EXAMPLES,
    run=run,
    details="The judge is a small network that was trained apart from the embedded model and knows its world alone: "
    "likeness is the cosine to the photos in its space of subjects, and a prompt is right where it reads the object, "
    "the place and the style that were asked for.",
    translate=TRANSLATE,
)
