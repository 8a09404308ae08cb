"""pcs upscale: small pictures made large by an up-scaler and what it has learned of a subject."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ..config import keep_config
from ..exit_codes import DONE, INTERRUPTED
from ..interrupt import stop_on_ctrl_c
from ..options import Command, Option, grouped, integer, number
from ..progress import Progress
from . import COMMANDS
from .common import (
    ETA,
    FORCE,
    GUIDANCE,
    HOLDING,
    MODEL_FLAGS,
    MOST_PIXELS,
    NEGATIVE,
    SAMPLER,
    SEED,
    STEPS,
    STRENGTH,
    UPSCALER_EXAMPLE,
    check_drawing,
    check_room,
    filled,
    free_name,
    open_concept,
    open_model,
    say,
    slug,
)
from .other_trainers import MODEL_TRANSLATE
from .sample import save_image

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...concept.concept import Concept
    from ...model.model import Model
    from ...training.stop import Stop

OPTIONS = (
    *grouped(
        "words",
        Option("pictures", "a folder of pictures, or single pictures", metavar="PICTURE", many=True),
    ),
    *grouped(
        "concepts",
        Option(
            "--concept",
            "a run's folder or a concept file, trained with stage=super_resolution; may be repeated",
            metavar="PATH",
            many=True,
        ),
        STRENGTH,
        FORCE,
    ),
    *MODEL_FLAGS,
    *HOLDING,
    *grouped(
        "images",
        Option(
            "--prompt",
            "what the pictures show; {} stands for the subject",
            metavar="TEXT",
            otherwise="the concept's own prompt",
        ),
        NEGATIVE,
        STEPS,
        GUIDANCE,
        SAMPLER,
        SEED,
        ETA,
        Option(
            "--noise-level",
            "variance of the noise on the small picture",
            number(0, 1, "1e-3"),
            metavar="X",
            also=("--noise_level",),
            otherwise="the concept's, or that of level 20",
        ),
        Option(
            "--size",
            "shorter side of the result in pixels: the picture is resized first",
            integer(64, "512", MOST_PIXELS),
            metavar="N",
            otherwise="the picture's, times the model's factor",
        ),
        Option("--batch", "pictures per batch", integer(1, "4"), 4, "N", also=("--batch_size",)),
    ),
    *grouped(
        "output",
        Option("--out", "folder for the images", metavar="FOLDER", default="out/upscaled", also=("--output_dir",)),
        Option("--quiet", "print only the images' paths", None, False),
    ),
)

EXAMPLES = (
    (
        f"pcs upscale my-photos --size 512 --concept out/details --model {UPSCALER_EXAMPLE}",
        "photos through the subject's own up-scaler",
    ),
    (
        f'pcs upscale my-photos --size 512 --prompt "a photo of a dog" --model {UPSCALER_EXAMPLE}',
        "the up-scaler alone",
    ),
)


def check(options: argparse.Namespace) -> None:
    """UsageError for what is wrong already, before anything is loaded."""
    if not options.pictures:
        raise UsageError(f"pcs upscale needs a picture: pcs upscale small.png --model {UPSCALER_EXAMPLE}")
    for name in options.pictures:
        if not Path(name).expanduser().exists():
            raise UsageError(f"{name} does not exist; give a picture, or a folder of them")
    if options.model is None:
        raise UsageError(f"the embedded model enlarges nothing. Fix: give an up-scaler, --model {UPSCALER_EXAMPLE}")
    check_drawing(options, [options.prompt or ""])


def run(options: argparse.Namespace) -> int:
    """Upscale; the exit code."""
    check(options)
    with stop_on_ctrl_c("stopping after this batch") as stop:
        return upscale_to_files(options, stop)


def upscale_to_files(options: argparse.Namespace, stop: Stop) -> int:
    """Every picture, batch after batch, each result in a file of its own; the exit code."""
    from ...data.pictures import load_pictures
    from ...model.upscaler import check_upscaler

    names = [Path(name).expanduser() for name in options.pictures]
    loaded = load_pictures(names[0] if len(names) == 1 else names)
    for text in [*(f"skipped: {reason}" for reason in loaded.skipped), *loaded.notes]:
        say(text)
    model = open_model(options)
    check_upscaler(model)
    concepts = [open_concept(where, model, options.force) for where in options.concept or ()]
    prompt = None if options.prompt is None else filled(options.prompt, concepts)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, len(loaded.pictures), options.size or 1024)
    small = [(Path(p.name).stem, _resized(model, p.pixels, options.size)) for p in loaded.pictures]
    batches = _batches(small, options.batch)
    done = 0
    with Progress("upscaling", quiet=options.quiet) as progress:
        for number_, part in enumerate(batches):
            if stop():
                return INTERRUPTED

            def on_step(step: int, steps: int, *_: object, before: int = number_) -> None:
                progress.count(before * steps + step + 1, len(batches) * steps)

            images = upscale_batch(options, model, concepts, [p for _, p in part], prompt, done, on_step)
            done += len(part)
            for (name, _), image in zip(part, images, strict=True):
                print(save_image(image, free_name(folder, slug(name))))
    keep_config(folder / "run.toml", COMMAND, options, without=("quiet",))
    return DONE


def upscale_batch(
    options: argparse.Namespace,
    model: Model,
    concepts: list[Concept],
    pictures: list[Any],
    prompt: str | None,
    before: int,
    on_step: Callable[..., None],
) -> list[Image]:
    """Pictures of one size, large; the first has the seed plus how many came `before`, the next one more."""
    from ...sampling.upscaling import upscale

    return upscale(
        model,
        pictures,
        prompt,
        concepts,
        strengths=options.strength or None,
        negative=options.negative,
        steps=options.steps,
        guidance=options.guidance,
        sampler=options.sampler,
        eta=options.eta,
        noise_level=options.noise_level,
        seed=options.seed + before,
        batch=options.batch,
        on_step=on_step,
    )


def _resized(model: Model, pixels: Any, size: int | None) -> Any:
    """The picture at the size from which the up-scaler makes `size` pixels of its shorter side."""
    if size is None:
        return pixels
    import numpy as np
    from PIL import Image

    from ...model.autoencoder import latent_factor

    factor = latent_factor(model)
    if size % factor:
        raise UsageError(f"--size must be a multiple of {factor} for {model.name}, not {size}")
    height, width = pixels.shape[:2]
    scale = size // factor / min(height, width)
    wide, high = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize((wide, high), Image.Resampling.BICUBIC))


def _batches(pictures: list[tuple[str, Any]], batch: int) -> list[list[tuple[str, Any]]]:
    """The pictures in their order, as many of one size together as a batch holds."""
    batches: list[list[tuple[str, Any]]] = []
    for picture in pictures:
        last = batches[-1] if batches else []
        if last and len(last) < batch and last[0][1].shape == picture[1].shape:
            last.append(picture)
        else:
            batches.append([picture])
    return batches


COMMAND = Command(
    name="upscale",
    about=COMMANDS["upscale"],
    options=OPTIONS,
    examples=EXAMPLES,
    run=run,
    details="The model must be an up-scaler, which pcs train --set stage=super_resolution teaches a subject's fine "
    "detail. Picture n of a call uses seed + n. Existing images are never overwritten.",
    translate=MODEL_TRANSLATE,
)
