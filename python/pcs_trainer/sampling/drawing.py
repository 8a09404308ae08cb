"""Sampling: prompts and concepts to images.

    sample(model, ["a photo of a <dog> dog on the beach"], [concept], lag=True)

`sample` makes a scene (what is drawn) and options (how), and `draw` draws it.
Letters: P images of a call, B of a batch, C latent channels, h x w latent positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..model.autoencoder import at_once, decode, latent_factor, own_size
from ..model.text import Words
from ..model.upscaler import level_labels, with_noise
from .lag import Lag, attention_of
from .maps import Maps
from .predictor import Predictor
from .samplers import SAMPLERS, OnStep, Sampler, unit_noise
from .scene import Scene, make_scene, negative_read

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Unpack

    from ..model.model import Model


@dataclass(frozen=True)
class SampleOptions:
    """How a scene is drawn; the values mean what they mean in `sample`."""

    steps: int = 25
    guidance: float | None = None
    sampler: str = "ddim"
    eta: float = 0.0
    seed: int = 0
    size: int | tuple[int, int] | None = None
    lag: bool | Lag = False
    batch: int = 8
    maps: bool | Sequence[str] = False
    noise: Tensor | None = None  # [P, C, h, w]
    small: Tensor | None = None  # [P, 3, h, w]: the pictures that an up-scaler enlarges
    small_noise: float = 0.0  # variance of the noise on them
    on_step: OnStep = None
    progress: bool = False

    def guidance_for(self, model: Model) -> float:
        """The weight of classifier-free guidance; 1 is none."""
        if self.guidance is None:
            if self.small is not None:
                return 9.0  # the default of diffusers' pipeline for up-scaling
            # The defaults of diffusers' pipelines: 7.5 for SD 1.x and 2.x, 5 for XL, which alone reads added inputs.
            # The embedded model's card was measured at 5.
            return 5.0 if model.embedded or model.unet.add_embedding is not None else 7.5
        return float(self.guidance)


@dataclass
class Drawing:
    """What was drawn: images, the maps that were asked for, and the latents [P, C, h, w] on the CPU."""

    images: list[Image]
    maps: Maps
    latents: Tensor


@torch.no_grad()
def draw(scene: Scene, options: SampleOptions) -> Drawing:
    """Draw a scene, batch after batch.

    Args:
        scene: what is drawn: model, prompts, concepts, and which of them each image has.
        options: how it is drawn.

    Returns:
        The drawing; only of the finished batches where `options.on_step` ended it.
    """
    model, steps = scene.model, options.steps
    guidance, sampler = options.guidance_for(model), _sampler(options.sampler, options.eta)
    if guidance == 1:
        scene = replace(scene, negatives=None)
    elif scene.negatives is None:
        scene = replace(scene, negatives=[""] * len(scene.prompts))
    pixels, shape = _sizes(model, options)
    batches = _batches(len(scene.prompts), options, shape)
    device = model.unet.conv_in.weight.device
    images: list[Image] = []
    maps: list[Maps] = []
    finished: list[Tensor] = [torch.zeros(0, *shape)]  # so that there is something to join when no batch was finished
    with scene.placed(), _Steps(options.on_step, steps * len(batches), options.progress) as counted:
        attention = attention_of(scene, Lag() if options.lag is True else options.lag or None, options.maps)
        for pictures in batches:
            # one generator an image, so that an image does not depend on its batch
            random = [torch.Generator().manual_seed(options.seed + i) for i in pictures]
            small = (
                None if options.small is None else _noisy(options.small[list(pictures)], options.small_noise, random)
            )
            given = None if options.noise is None else options.noise[list(pictures)].float()
            noise = unit_noise((len(pictures), *shape), random) if given is None else given  # [B, C, h, w]
            scene.choose(pictures)
            text = scene.read(pictures)
            predict = Predictor(model.unet, text, pixels, guidance, steps, attention, pictures, shape[1:])
            if small is not None:
                predict.reads(small, level_labels(model, options.small_noise, len(pictures)))
            x = sampler(predict, model.schedule, steps, noise.to(device), random, counted)
            if counted.stopped:
                break
            _check_finite(x, scene.prompts, pictures)
            images += decode(model, x)
            maps += [predict.taker.maps()] if predict.taker else []
            finished.append(x.cpu())
    return Drawing(images, Maps.joined(maps), torch.cat(finished))


class Options(TypedDict, total=False):
    """The keywords of `sample` that do not decide what it returns, for the overloads."""

    strengths: Sequence[float] | None
    negative: str | Sequence[str] | None
    steps: int
    guidance: float | None
    sampler: str
    eta: float
    seed: int
    size: int | tuple[int, int] | None
    lag: bool | Lag
    words: Words | None
    batch: int
    latents: Tensor | None
    on_step: OnStep
    progress: bool
    index: Sequence[int | None] | Tensor | None
    hold_first: bool


Prompts = str | Sequence[str]
Concepts = Concept | Sequence[Concept]


@overload
def sample(
    model: Model,
    prompts: Prompts,
    concepts: Concepts = (),
    *,
    return_maps: Literal[False] = False,
    return_latents: Literal[False] = False,
    **options: Unpack[Options],
) -> list[Image]: ...
@overload
def sample(
    model: Model,
    prompts: Prompts,
    concepts: Concepts = (),
    *,
    return_maps: Literal[True] | Sequence[str],
    return_latents: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[list[Image], Maps]: ...
@overload
def sample(
    model: Model,
    prompts: Prompts,
    concepts: Concepts = (),
    *,
    return_maps: Literal[False] = False,
    return_latents: Literal[True],
    **options: Unpack[Options],
) -> tuple[list[Image], Tensor]: ...
@overload
def sample(
    model: Model,
    prompts: Prompts,
    concepts: Concepts = (),
    *,
    return_maps: Literal[True] | Sequence[str],
    return_latents: Literal[True],
    **options: Unpack[Options],
) -> tuple[list[Image], Maps, Tensor]: ...
@overload
def sample(
    model: Model,
    prompts: Prompts,
    concepts: Concepts = (),
    *,
    return_maps: bool | Sequence[str] = False,
    return_latents: bool = False,
    **options: Unpack[Options],
) -> list[Image] | tuple[Any, ...]: ...
def sample(
    model: Model,
    prompts: Prompts,
    concepts: Concepts = (),
    *,
    strengths: Sequence[float] | None = None,
    negative: str | Sequence[str] | None = "",
    steps: int = 25,
    guidance: float | None = None,
    sampler: str = "ddim",
    eta: float = 0.0,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    lag: bool | Lag = False,
    words: Words | None = None,
    batch: int = 8,
    return_maps: bool | Sequence[str] = False,
    return_latents: bool = False,
    latents: Tensor | None = None,
    on_step: Callable[[int, int, Tensor], object] | None = None,
    progress: bool = False,
    index: Sequence[int | None] | Tensor | None = None,
    hold_first: bool = False,
) -> list[Image] | tuple[Any, ...]:
    """Sample an image of each prompt; image i is drawn from seed + i, whatever the batch.

    Args:
        concepts, strengths: one strength per concept; default: 1.
        index: the concept of each prompt (None: none); default: every prompt has all concepts.
        negative: one negative prompt for all, or one per prompt.
        guidance: classifier-free guidance, 1 for none; default: 7.5 (5 for SDXL and the embedded model).
        sampler, eta: a name in sampling.NAMES; eta adds noise to ddim's steps.
        size: pixels, or (height, width); default: the model's native size.
        latents: the initial noise [P, C, h, w] in place of the seeds'.
        lag: restrict the concepts to the subject's pixels (True, or a Lag with its options).
        return_maps: attention maps of the concepts' words (True) or of these words.
        on_step: called as on_step(step, steps, latents) over all batches; returning False ends the call.
        words, hold_first: learned words beside the concepts', and whether the first token's state stays frozen.

    Returns:
        The images; with return_maps and return_latents a tuple: images, Maps, latents [P, C, h, w].
    """
    how = SampleOptions(
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        eta=eta,
        seed=seed,
        size=size,
        lag=lag,
        batch=batch,
        maps=return_maps,
        noise=latents,
        on_step=on_step,
        progress=progress,
    )
    without = negative_read(negative, guidance)
    drawn = draw(make_scene(model, prompts, concepts, strengths, without, index, words, hold_first), how)
    asked = [drawn.images, *([drawn.maps] if return_maps else []), *([drawn.latents] if return_latents else [])]
    return drawn.images if len(asked) == 1 else tuple(asked)


def pictures_at_once(model: Model, size: int | tuple[int, int] | None) -> int:
    """How many images to draw together where memory counts: two of 512 x 512, of smaller ones up to eight.

    With guidance a forward holds twice as many, and keeps nothing for a backward: it stays below a training step.
    """
    height, width = _sizes(model, SampleOptions(size=size))[0]
    return at_once(height * width // 2, SampleOptions.batch)


def _sampler(name: str, eta: float) -> Sampler:
    if name not in SAMPLERS:
        raise ValueError(f"the sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if eta and name != "ddim":
        raise ValueError(f"eta belongs to the sampler 'ddim'; {name!r} has none")
    return partial(SAMPLERS[name], eta=eta) if eta else SAMPLERS[name]


def _noisy(small: Tensor, variance: float, random: Sequence[torch.Generator]) -> Tensor:
    """The small pictures [B, 3, h, w] of a batch as the up-scaler reads them; their noise is drawn before any other."""
    return with_noise(small, unit_noise(small.shape, random), variance)


def _sizes(model: Model, options: SampleOptions) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """(height and width in pixels, the shape [C, h, w] of one image's latents)"""
    channels, takes, size = model.vae.config.latent_channels, model.unet.settings["in_channels"], options.size
    factor = latent_factor(model)
    if options.small is not None:
        height, width = options.small.shape[2:]
        return (factor * height, factor * width), (channels, height, width)
    if takes != channels or model.unet.class_embedding is not None:
        raise ValueError(
            f"this UNet reads {takes} channels where its latents have {channels}, or classes too, as models for "
            f"inpainting and upscaling do; sample() draws from a prompt alone"
            + (". Fix: pcs upscale, or upscale(), which enlarges pictures" if model.upscales else "")
        )
    size = own_size(model) if size is None else size
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(height, width) < factor or height % factor or width % factor:
        raise ValueError(f"size must be multiples of {factor} pixels for this model, not {height} x {width}")
    return (height, width), (channels, height // factor, width // factor)


def _batches(count: int, options: SampleOptions, shape: tuple[int, int, int]) -> list[range]:
    """The images of each batch; ValueError where the options do not fit so many images of this shape."""
    noise, batch = options.noise, options.batch
    if noise is not None and tuple(noise.shape) != (count, *shape):
        raise ValueError(f"latents must be the initial noise {[count, *shape]}, not {list(noise.shape)}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    return [range(start, min(start + batch, count)) for start in range(0, count, batch)]


class _Steps:
    """Counts the steps of all batches: for the progress bar, and for a callback that may end the call."""

    def __init__(self, on_step: OnStep, total: int, progress: bool) -> None:
        self.on_step, self.total, self.done, self.stopped = on_step, total, 0, False
        self.progress = progress
        self.bar: Any = None

    def __enter__(self) -> _Steps:
        if self.progress:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=self.total, desc="sampling", unit="step")
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, _step: int, _steps: int, x: Tensor) -> bool:
        if self.bar is not None:
            self.bar.update()
        if self.on_step is not None and self.on_step(self.done, self.total, x) is False:
            self.stopped = True
        self.done += 1
        return not self.stopped


def _check_finite(x: Tensor, prompts: Sequence[str], pictures: Sequence[int]) -> None:
    for latents, i in zip(x, pictures, strict=True):
        if not bool(torch.isfinite(latents).all()):
            raise ValueError(f"picture {i} ({prompts[i]!r}) became NaN while it was drawn; load the model in float32")
