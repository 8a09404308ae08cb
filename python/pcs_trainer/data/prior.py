"""Pictures of the class, for the loss that holds on to what the model knew: the user's own, or drawn by the model."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..model.fingerprint import fingerprint, weights_mark
from .latents import cache_folder
from .pictures import LONGEST_CAPTION, Loaded, Picture, is_blank, load_pictures

if TYPE_CHECKING:
    from ..model.model import Model
    from ..settings import Settings

Count = Callable[[int, int], Any]  # (done, total)
ATTEMPTS = 5  # rounds of drawing blank class images again


def prior_pictures(model: Model, prompt: str, s: Settings, report: Any, count: Count | None = None) -> list[Picture]:
    """From the folder that was given (captions beside its pictures), else drawn and kept by what decides them.

    Args:
        model: what draws them, frozen.
        prompt: of the class.
        s: how many, from where, with how many sampling steps.
        report: told in words what happens.
        count: called as count(done, total) with each sampling step.
    """
    if s.prior_folder:
        found = _listed(Path(s.prior_folder).expanduser()) or load_pictures(s.prior_folder)
        blank = [p.name for p in found.pictures if is_blank(p.pixels)]
        if len(blank) == len(found.pictures):
            raise ValueError(f"every picture in {s.prior_folder} is blank, such as {blank[0]}; give real ones, or none")
        for reason in [*found.skipped, *(f"{name} is blank" for name in blank)]:
            report(f"skipped: {reason}")
        return [p for p in found.pictures if not is_blank(p.pixels)]
    numbers = [str(n) for n in (s.prior_steps, s.seed, s.resolution, s.prior_images)]
    key = "|".join([_drawer(model), prompt, *numbers])
    folder = cache_folder() / "prior" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if folder.is_dir():
        kept = load_pictures(folder).pictures
        if len(kept) == s.prior_images:
            return kept
    report(f"drawing {s.prior_images} pictures of {prompt!r}, once for all runs; --prior own, prior='own', needs none")
    drawn = draw_prior(model, prompt, s, count)
    _keep(folder, drawn)
    return drawn


def _drawer(model: Model) -> str:
    """What tells apart the networks that a drawing goes through."""
    return "|".join([fingerprint(model), *map(weights_mark, [*model.text_encoders, model.vae])])


def _listed(folder: Path) -> Loaded | None:
    """The class images that a folder lists, as Custom Diffusion's retrieval writes them; None where it lists none.

    images.txt has a path a line, from the folder's own or from where the program runs; caption.txt a caption a line.
    """
    names, captions = folder / "images.txt", folder / "caption.txt"
    if not names.is_file():
        return None
    paths = [Path(line.strip()) for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
    said = captions.read_text(encoding="utf-8").splitlines() if captions.is_file() else [""] * len(paths)
    if len(said) != len(paths):
        raise ValueError(f"{captions} has {len(said)} lines and {names} {len(paths)}: each image needs one caption")
    long = next((text for text in said if len(text) > LONGEST_CAPTION), None)
    if long is not None:
        raise ValueError(f"{captions} has a line of {len(long):,} characters: a caption is a few sentences")
    return load_pictures([folder / p if (folder / p).is_file() else p for p in paths], captions=said)


def draw_prior(model: Model, prompt: str, s: Settings, count: Count | None = None) -> list[Picture]:
    """The frozen model's pictures of the class; blank ones are drawn again."""
    import pcs_kernels

    from ..sampling.drawing import pictures_at_once, sample

    result: list[Picture] = []
    for attempt in range(ATTEMPTS):
        wanted = s.prior_images - len(result)
        drawn = sample(
            model,
            [prompt] * wanted,
            steps=s.prior_steps,
            seed=1_000_003 * (s.seed + 1) + 10_007 * attempt,
            size=s.resolution or None,
            batch=pictures_at_once(model, s.resolution or None),
            on_step=None if count is None else lambda done, total, _: count(done, total),
        )
        pixels = [np.asarray(image.convert("RGB")) for image in drawn]
        result += [Picture(p, f"prior-{len(result) + i:04d}.png") for i, p in enumerate(pixels) if not is_blank(p)]
        if len(result) >= s.prior_images:
            pcs_kernels.forget_packed_weights()  # packed for the shapes of a drawing; a step packs for its own
            return result
    raise ValueError(f"the model draws blank pictures of {prompt!r}; give a folder of real ones with prior_folder=...")


def _keep(folder: Path, pictures: list[Picture]) -> None:
    from PIL import Image

    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture.pixels).save(part / f"{i:04d}.png")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)  # kept for the next run alone: this one has them in memory
