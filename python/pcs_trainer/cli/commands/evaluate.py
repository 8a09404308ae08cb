"""pcs evaluate: subject fidelity, prompt fidelity and class drift of a concept."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ...files import written_text
from ..exit_codes import DONE, INTERRUPTED
from ..interrupt import Stopped, stop_on_ctrl_c
from ..options import Command, Option, grouped, integer, one_of
from ..progress import Progress
from . import COMMANDS
from .common import (
    GUIDANCE,
    HOLDING,
    LAG_OPTIONS,
    MODEL_FLAGS,
    MOST_IMAGES,
    SEED,
    STEPS,
    concept_file,
    lag_of,
    open_concept,
    open_model,
)
from .other_trainers import MODEL_TRANSLATE

if TYPE_CHECKING:
    import numpy as np

    from ...concept.concept import Concept
    from ...model.model import Model
    from ...training.stop import Stop

PROMPT_SETS = ("dreambench-object", "dreambench-live")  # evaluation/prompts.py holds them, and needs no torch

OPTIONS = (
    Option("concept", "a run's folder or a concept file", metavar="CONCEPT", group="words"),
    *grouped(
        "evaluation",
        Option(
            "--photos",
            "photos of the subject, preferably not the ones it was trained on; of one of several, "
            "TOKEN=FOLDER, and repeated",
            metavar="[TOKEN=]FOLDER",
            many=True,
            also=("--instance_data_dir",),
        ),
        Option(
            "--prompt",
            "prompt with {} for the subject; may be repeated",
            metavar="TEXT",
            many=True,
            also=("--validation_prompt",),
            otherwise="twenty for this model",
        ),
        Option(
            "--prompts",
            f"a set of prompts by name: {', '.join(PROMPT_SETS)}",
            one_of("set", PROMPT_SETS),
            metavar="NAME",
            otherwise="twenty for this model",
        ),
        Option("--clip", "folder of a CLIP model, for real checkpoints", metavar="FOLDER"),
        Option("--dino", "folder of a DINO model, for real checkpoints", metavar="FOLDER"),
        Option("--lpips", "DreamBooth's DIV too, for which the package lpips is needed", None, False),
        Option(
            "--count", "images of the subject's training prompt, and of its class", integer(2, "8", MOST_IMAGES), 8, "N"
        ),
        STEPS,
        GUIDANCE,
        Option("--lag", "use LAG sampling", None, False),
        *LAG_OPTIONS,
        SEED,
    ),
    *MODEL_FLAGS,
    *HOLDING,
    *grouped(
        "output",
        Option("--out", "also write the scores to this JSON file", metavar="FILE"),
        Option("--quiet", "print only the scores", None, False),
    ),
)

EXAMPLES = (
    (
        "pcs evaluate out/mug --photos examples/photos",
        "subject and prompt fidelity and class drift, and the base model's",
    ),
    (
        "pcs evaluate out/mug --photos examples/photos --lag --count 16 --out out/mug/evaluation.json",
        "with LAG, from more images, the scores in a file",
    ),
    (
        "pcs evaluate out/both --photos '<dog>=my-dog' --photos '<cat>=my-cat'",
        "two subjects that were trained together: their mean, and each",
    ),
)


def check(options: argparse.Namespace) -> None:
    """UsageError for what is wrong already, before anything is loaded."""
    if len(options.concept or []) != 1:
        raise UsageError("pcs evaluate needs one concept: pcs evaluate out/mug --photos examples/photos")
    if not options.photos:
        raise UsageError("--photos is missing: give a folder of photos of the subject")
    if options.prompt and options.prompts:
        raise UsageError("--prompt and --prompts: give prompts of your own, or the name of a set, not both")
    for text in options.photos:
        if not Path(text).exists() and not Path(text.partition("=")[2] or text).exists():
            raise UsageError(f"--photos: {text} does not exist")
    for flag in ("clip", "dino"):
        value = getattr(options, flag)
        if value and not Path(value).exists():
            raise UsageError(f"--{flag}: {value} does not exist")
    if options.lpips and find_spec("lpips") is None:
        raise UsageError("--lpips: the package lpips is not installed. Fix: pip install lpips")
    concept_file(options.concept[0])
    lag_of(options)


def run(options: argparse.Namespace) -> int:
    """Evaluate and print the scores; the exit code."""
    check(options)
    with stop_on_ctrl_c("stopping after this step") as stop:
        try:
            return measure(options, stop)
        except Stopped:
            return INTERRUPTED


def photos_of(texts: list[str], concept: Concept) -> str | dict[str, str]:
    """The photos of the concept's one subject, or of each subject by its word."""
    if len(texts) == 1 and Path(texts[0]).exists():
        if len(concept.subjects) == 1:
            return texts[0]
        texts = [f"={texts[0]}"]
    words = [token or class_word for token, class_word in concept.subjects]
    found = {}
    for text in texts:
        word, _, folder = text.partition("=")
        if word not in words or word in found or not folder:
            example = " ".join(f"--photos {shlex.quote(f'{w}=FOLDER')}" for w in words)
            raise UsageError(f"--photos: say once for each subject whose photos they are: {example}")
        found[word] = folder
    return found


def measure(options: argparse.Namespace, stop: Stop) -> int:
    """Sample, measure and print the scores; the exit code."""
    from ...evaluation.prompts import SETS
    from ...evaluation.scores import evaluate

    model = open_model(options)
    if not model.embedded and not options.clip and not options.dino:
        raise UsageError(
            "a real checkpoint needs an image encoder to be evaluated. Fix: --clip FOLDER, --dino FOLDER or both"
        )
    concept = open_concept(options.concept[0], model)
    with Progress("sampling", quiet=options.quiet) as progress:
        found = evaluate(
            model,
            concept,
            photos_of(options.photos, concept),
            prompts=SETS[options.prompts] if options.prompts else options.prompt or None,
            count=options.count,
            lag=lag_of(options),
            clip=options.clip,
            dino=options.dino,
            lpips=options.lpips,
            draw=sampler_for(model, options, progress, stop),
        )
    print(found)
    if options.out:
        written_text(Path(options.out), json.dumps(found.asdict(), indent=1))
    return DONE


def sampler_for(
    model: Model, options: argparse.Namespace, progress: Progress, stop: Stop
) -> Callable[..., list[np.ndarray]]:
    """What samples for the evaluation, with progress; Ctrl-C ends it by Stopped."""
    import numpy as np

    from ...sampling.drawing import sample

    def on_step(step: int, steps: int, *_: object) -> None:
        if stop():
            raise Stopped
        progress.count(step + 1, steps)

    def draw(prompts: list[str], concepts: list[Concept], **masked: Any) -> list[np.ndarray]:
        progress.label = f"sampling {len(prompts)} images with the {'concept' if concepts else 'base model'}"
        images = sample(
            model,
            prompts,
            concepts,
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed,
            on_step=on_step,
            **masked,
        )
        return [np.asarray(image) for image in images]

    return draw


COMMAND = Command(
    name="evaluate",
    about=COMMANDS["evaluate"],
    options=OPTIONS,
    examples=EXAMPLES,
    run=run,
    details="The embedded model is evaluated by its judge, a small network that was trained apart and knows only that "
    "world; real checkpoints by CLIP and DINO, from folders on this machine: CLIP-T is the text similarity, CLIP-I the "
    "image similarity, DINO the subject similarity. pres and div are DreamBooth's PRES (class images compared with the "
    "photos, less is better) and DIV (LPIPS between images of one prompt).",
    translate=MODEL_TRANSLATE,
)
