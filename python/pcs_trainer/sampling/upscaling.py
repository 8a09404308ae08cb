"""Up-scaling: small pictures and prompts to large ones, by an up-scaler and what it has learned of a subject.

Letters: P pictures of a call, C latent channels, h x w pixels of a small picture, which are the latent positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..concept.concept import Concept
from ..model.autoencoder import to_tensor
from ..model.text import Words
from ..model.upscaler import check_upscaler, variance_at
from .drawing import SampleOptions, draw
from .samplers import OnStep
from .scene import make_scene, negative_read

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..model.model import Model

LEVEL = 20  # of the noise on a small picture, where nothing else is said: the default of diffusers' pipeline
Pictures = Any  # a PIL picture, a uint8 array [h, w, 3], or a list of them


def upscale(
    model: Model,
    pictures: Pictures,
    prompts: str | Sequence[str] | None = None,
    concepts: Concept | Sequence[Concept] = (),
    *,
    strengths: Sequence[float] | None = None,
    negative: str | Sequence[str] | None = "",
    steps: int = 25,
    guidance: float | None = None,
    sampler: str = "ddim",
    eta: float = 0.0,
    noise_level: float | None = None,
    seed: int = 0,
    batch: int = 4,
    words: Words | None = None,
    latents: Tensor | None = None,
    on_step: OnStep = None,
    progress: bool = False,
    hold_first: bool = False,
) -> list[Image]:
    """Enlarge pictures, each side by the factor of the up-scaler's autoencoder; picture i is drawn from seed + i.

    Args:
        model: an up-scaler, such as stabilityai/stable-diffusion-x4-upscaler.
        pictures: PIL pictures or uint8 arrays [h, w, 3], all of one size, or one of them.
        prompts: what they show: one for all, or one for each; default: the first concept's own, else "".
        concepts, strengths: what was learned by stage="super_resolution"; one strength per concept, default: 1.
        guidance: classifier-free guidance, 1 for none; default: 9.
        noise_level: variance of the noise on the small pictures; default: what the first concept was trained with, or
            that of level 20, diffusers' default.
        negative, steps, sampler, eta, batch, on_step, progress, words, hold_first: as in `sample`.
        latents: the initial noise [P, C, h, w] in place of the seeds'.

    Returns:
        The large pictures.
    """
    check_upscaler(model)
    small = _small(pictures)
    concepts = [concepts] if isinstance(concepts, Concept) else list(concepts)
    if prompts is None:
        prompts = concepts[0].instance_prompt if concepts else ""
    texts = [prompts] * len(small) if isinstance(prompts, str) else list(prompts)
    if len(texts) != len(small):
        raise ValueError(f"{len(texts)} prompts and {len(small)} pictures: give one prompt for all, or one for each")
    variance = noise_for(model, concepts) if noise_level is None else float(noise_level)
    if not 0 <= variance < 1:
        raise ValueError(f"noise_level is a variance, at least 0 and below 1, not {noise_level!r}")
    how = SampleOptions(
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        eta=eta,
        seed=seed,
        batch=batch,
        noise=latents,
        on_step=on_step,
        progress=progress,
        small=small,
        small_noise=variance,
    )
    without = negative_read(negative, guidance)
    return draw(make_scene(model, texts, concepts, strengths, without, None, words, hold_first), how).images


def noise_for(model: Model, concepts: Sequence[Concept]) -> float:
    """The variance of the noise on the small picture: the first concept's that was trained with one, or LEVEL's."""
    for concept in concepts:
        if concept.small_noise is not None:
            return concept.small_noise
    schedule, classes = model.low_res_schedule, model.unet.settings["num_class_embeds"]
    return variance_at(schedule, min(LEVEL, (classes or len(schedule)) - 1))


def _small(pictures: Pictures) -> Tensor:
    """The pictures as a tensor [P, 3, h, w] in [-1, 1]; ValueError where they are not pictures of one size."""
    listed = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    if not listed:
        raise ValueError("pictures is empty: give at least one picture")
    arrays = [np.asarray(p.convert("RGB")) if hasattr(p, "convert") else p for p in listed]
    for i, pixels in enumerate(arrays):
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            found = type(pixels).__name__
            if isinstance(pixels, np.ndarray):
                found = f"{pixels.dtype} {list(pixels.shape)}"
            raise ValueError(f"picture {i} must be a PIL picture or a uint8 array [h, w, 3], not {found}")
    sizes = {pixels.shape[:2] for pixels in arrays}
    if len(sizes) > 1:
        said = " and ".join(f"{height} x {width}" for height, width in sorted(sizes)[:2])
        raise ValueError(f"the pictures of one call have one size, and these are of {said}: call once for each size")
    return torch.stack([to_tensor(pixels) for pixels in arrays])
