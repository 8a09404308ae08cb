"""pcs sample: images of what was learned."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...files import written
from ...sampling.names import PRESETS
from ..config import keep_config
from ..exit_codes import DONE, INTERRUPTED
from ..interrupt import stop_on_ctrl_c
from ..options import Command, Option, grouped, integer, one_of
from ..progress import Progress
from . import COMMANDS
from .common import (
    ETA,
    FORCE,
    GUIDANCE,
    HOLDING,
    LAG_OPTIONS,
    MODEL_FLAGS,
    MOST_PIXELS,
    NEGATIVE,
    SAMPLER,
    SEED,
    STEPS,
    STRENGTH,
    check_amount,
    check_drawing,
    check_room,
    filled,
    free_name,
    lag_of,
    open_concept,
    open_model,
    say,
    slug,
)
from .other_trainers import MODEL_TRANSLATE

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...concept.concept import Concept
    from ...model.model import Model
    from ...training.stop import Stop

# fmt: off
OPTIONS = (
    *grouped(
        "words",
        Option("prompts", "what to sample; {} stands for the subject", metavar="PROMPT", many=True),
        Option("--prompt", "a prompt given as a flag; may be repeated", metavar="TEXT", many=True),
    ),
    *grouped(
        "concepts",
        Option("--concept", "a run's folder, a concept file, or another program's LoRA or embedding; may be repeated",
               metavar="PATH", many=True, also=("--lora", "--network_weights", "--embedding")),
        replace(STRENGTH, also=("--network_mul", "--lora_scale")),
        Option("--lag", "restrict each concept to the pixels that attend to its words (LAG sampling)", None, False),
        *LAG_OPTIONS,
        FORCE,
    ),
    *MODEL_FLAGS,
    *HOLDING,
    *grouped(
        "images",
        Option("--count", "images per prompt", integer(1, "4"), 1, "N",
               also=("--num_images_per_prompt", "--images_per_prompt", "--num_validation_images")),
        NEGATIVE,
        Option("--preset", f"sampling as a method's authors do it: {', '.join(PRESETS)}; flags given beside it win",
               one_of("preset", tuple(PRESETS)), metavar="NAME"),
        replace(STEPS, default=None, otherwise=str(STEPS.default)),
        GUIDANCE,
        replace(SAMPLER, default=None, otherwise=str(SAMPLER.default), also=("--sample_sampler", "--scheduler")),
        SEED,
        replace(ETA, default=None, otherwise="0", also=("--ddim_eta",)),
        Option("--size", "image size in pixels", integer(8, "512", MOST_PIXELS), metavar="N",
               also=("--height", "--width", "--resolution"), otherwise="the model's native size",
               single="pictures are square here"),
        Option("--batch", "images per batch", integer(1, "8"), 8, "N", also=("--batch_size",)),
    ),
    *grouped(
        "output",
        Option("--out", "folder for the images", metavar="FOLDER", default="out/pictures",
               also=("--output_dir", "--outdir")),
        Option("--quiet", "print only the images' paths", None, False),
    ),
)
# fmt: on

EXAMPLES = (
    ('pcs sample "a photo of {} on the beach" --concept out/mug --count 4', "four images of the subject of out/mug"),
    (
        'pcs sample "a {} in the snow" "a {} at night" --concept out/mug --lag --seed 7',
        "two prompts; the background is the base model's",
    ),
    ('pcs sample "a red mug in a meadow"', "the base model alone"),
    (
        'pcs sample "a {} on the beach" --concept out/mug --strength 0.7 --sampler dpmpp_2m --steps 20 --guidance 4',
        "at lower strength, with another sampler",
    ),
)


def fill_in(options: argparse.Namespace) -> None:
    """What the command line leaves open: by the preset, then by the defaults."""
    preset = PRESETS.get(options.preset or "", {})
    if options.sampler not in (None, preset.get("sampler")):
        preset = {**preset, "eta": 0.0}  # it is of the preset's own sampler
    for name, value in {"steps": STEPS.default, "sampler": SAMPLER.default, "eta": ETA.default, **preset}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def check(options: argparse.Namespace) -> None:
    """Join both kinds of prompts; UsageError for what is wrong already, before anything is loaded."""
    fill_in(options)
    options.prompts = [*(options.prompts or []), *(options.prompt or [])]
    if not options.prompts:
        raise UsageError('pcs sample needs a prompt: pcs sample "a photo of {} on the beach" --concept out/mug')
    if any(not p.strip() for p in options.prompts) and not options.concept:
        raise UsageError("the prompt is empty; describe what to sample")
    concepts, strengths = options.concept or [], options.strength or []
    if not concepts and (strengths or options.lag):
        raise UsageError("--strength and --lag apply to concepts; name one with --concept")
    check_drawing(options, options.prompts)
    check_amount(len(options.prompts), options.count, options.steps)
    lag_of(options)


def run(options: argparse.Namespace) -> int:
    """Sample; the exit code."""
    check(options)
    with stop_on_ctrl_c("stopping after this batch") as stop:
        return sample_to_files(options, stop)


def sample_to_files(options: argparse.Namespace, stop: Stop) -> int:
    """Every prompt `count` times, batch after batch, each image in a file of its own; the exit code."""
    from ...concept.attach import in_place
    from ...model.autoencoder import own_size
    from ...model.tokens import has_word

    model = open_model(options)
    concepts = [open_concept(where, model, options.force) for where in options.concept or ()]
    prompts = [filled(p, concepts) for p in options.prompts for _ in range(options.count)]
    subjects = [token or class_word for concept in concepts for token, class_word in concept.subjects]
    if subjects and not any(has_word(prompt, name) for name in subjects for prompt in prompts):
        say("no prompt names the subject: write {} where its words go")
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, len(prompts), options.size or min(own_size(model)))
    # One concept at its own strength may be a whole UNet: it takes the base's place, not a second one's room.
    alone = concepts[0] if len(concepts) == 1 and set(options.strength or [1.0]) == {1.0} else None
    with (
        in_place(model, alone) if alone else nullcontext() as rest,
        Progress("sampling", quiet=options.quiet) as progress,
    ):
        concepts = concepts if rest is None else [rest]
        for prompt in dict.fromkeys(prompts):
            progress.say(f"prompt: {prompt}")
        for first in range(0, len(prompts), options.batch):
            if stop():
                return INTERRUPTED
            part = prompts[first : first + options.batch]
            before, batches = first // options.batch, -(-len(prompts) // options.batch)

            def on_step(step: int, steps: int, *_: object, before: int = before, batches: int = batches) -> None:
                progress.count(before * steps + step + 1, batches * steps)

            images = sample_batch(options, model, concepts, part, options.seed + first, on_step)
            for prompt, image in zip(part, images, strict=True):
                print(save_image(image, free_name(folder, slug(prompt))))
    keep_config(folder / "run.toml", COMMAND, options, without=("quiet", "prompt", "preset"))
    return DONE


def sample_batch(
    options: argparse.Namespace,
    model: Model,
    concepts: list[Concept],
    prompts: list[str],
    seed: int,
    on_step: Callable[..., None],
) -> list[Image]:
    """One image for each prompt; the first has the seed, the next one more."""
    from ...sampling.drawing import sample

    return sample(
        model,
        prompts,
        concepts,
        strengths=options.strength or None,
        negative=options.negative,
        steps=options.steps,
        guidance=options.guidance,
        sampler=options.sampler,
        eta=options.eta,
        seed=seed,
        size=options.size,
        lag=lag_of(options),
        batch=options.batch,
        on_step=on_step,
    )


def save_image(image: Image, path: Path) -> Path:
    """The path, once the image is there as a whole PNG."""
    return written(path, lambda part: image.save(part, "PNG"))


COMMAND = Command(
    name="sample",
    about=COMMANDS["sample"],
    options=OPTIONS,
    examples=EXAMPLES,
    run=run,
    details="Image n of a call uses seed + n, so the same call gives the same images. Without --model the embedded "
    "model is used. Existing images are never overwritten.",
    translate=MODEL_TRANSLATE,
)
