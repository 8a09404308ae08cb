"""Drawing: prompts and concepts to pictures.

    sample(model, ["a photo of a <dog> dog on the beach"], [concept], lag=True)

Letters: P pictures of a call, B of a batch, C latent channels, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..model.autoencoder import decode, latent_factor, own_size
from ..model.text import Text, Words
from ..unet.unet import UNet
from .lag import Attention, Lag, Masker, attention_of
from .maps import Maps, MapTaker
from .samplers import SAMPLERS, draw
from .scene import make_scene

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..model.model import Model


class Predictor:
    """predict(x, t) of one batch: both halves of the guidance, the maps and the masks in one forward of the UNet."""

    def __init__(
        self, unet: UNet, text: Text, pixels: tuple[int, int], guidance: float, steps: int, attention: Attention,
        pictures: Sequence[int], latent_size: tuple[int, int],
    ) -> None:  # fmt: skip
        self.unet, self.guidance, self.steps, self.step = unet, guidance, steps, 0
        self.guided = guidance != 1.0
        self.kv = unet.text_kv(text.states)
        self.added = text.added(*pixels)
        self.lag = attention.lag
        self.capture = attention.of(pictures, self.guided)
        self.masker = None if attention.lag is None else Masker(attention.lag, attention.keys, self.guided)
        self.taker = MapTaker(attention.tokens, len(attention.keys), latent_size) if attention.tokens else None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        weight = self.unet.conv_in.weight
        both = (torch.cat([x, x]) if self.guided else x).to(weight)
        masks = self.masker if self.lag is not None and self.lag.masks_at(self.step, self.steps) else None
        self.step += 1
        if masks is None and self.taker is None:
            said = self.unet(both, t, self.kv, self.added)
        else:
            said, maps = self.unet(both, t, self.kv, self.added, capture=self.capture, masks=masks)
            if self.taker is not None:
                self.taker.take(maps, len(x))
        said = said.to(x)
        if not self.guided:
            return said
        without, given = said.chunk(2)
        return without + self.guidance * (given - without)


@torch.no_grad()
def sample(
    model: Model,
    prompts: str | Sequence[str],
    concepts: Concept | Sequence[Concept] = (),
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
    """Pictures of prompts; with return_maps and return_latents a tuple: pictures, Maps, latents [P, C, h, w].

    Picture i is drawn from seed + i, whatever the batch. strengths: one a concept. size: pixels, or (height, width).
    negative: one for all, or one a prompt. guidance: 1 is none; None is the model's own. latents: the initial noise.
    index: the concept of each prompt (None: none), all drawn together; without it every prompt has all concepts.
    return_maps: True for the concepts' words, or a list of words. words: further learned words and their rows.
    hold_first: the text's first token stays the frozen encoder's, as it does for concepts that were learned so.
    on_step(step, steps, latents) after step 0, 1, ... of all batches; returning False ends the call with the pictures
    of the batches that are finished.
    """
    guidance = _default_guidance(model) if guidance is None else float(guidance)
    scene = make_scene(model, prompts, concepts, strengths, (negative or "") if guidance != 1 else None, index, words)
    scene.hold_first |= hold_first
    draw_batch = _sampler(sampler, eta)
    count, like = len(scene.prompts), model.unet.conv_in.weight
    pixels, shape = _sizes(model, size)
    if latents is not None and tuple(latents.shape) != (count, *shape):
        raise ValueError(f"latents must be the initial noise {[count, *shape]}, not {list(latents.shape)}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    batches = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    images: list[Image] = []
    maps: list[Maps] = []
    finished: list[Tensor] = []
    with scene.placed(), _Steps(on_step, steps * len(batches), progress) as counted:
        attention = attention_of(scene, Lag() if lag is True else lag or None, return_maps)
        for pictures in batches:
            random = [torch.Generator().manual_seed(seed + i) for i in pictures]
            noise = draw((len(pictures), *shape), random) if latents is None else latents[list(pictures)].float()
            scene.choose(pictures)
            predict = Predictor(
                model.unet, scene.read(pictures), pixels, guidance, steps, attention, pictures, shape[1:]
            )
            x = draw_batch(predict, model.schedule, steps, noise.to(like.device), random, counted)
            if counted.stopped:
                break
            _check_finite(x, scene.prompts, pictures)
            images += decode(model, x)
            maps += [predict.taker.maps()] if predict.taker else []
            finished.append(x.cpu())
    asked: list[Any] = [images]
    asked += [Maps.joined(maps)] if return_maps else []
    asked += [torch.cat([*finished, torch.zeros(0, *shape)])] if return_latents else []
    return images if len(asked) == 1 else tuple(asked)


def _default_guidance(model: Model) -> float:
    return 5.0 if model.embedded else 7.5


def _sampler(name: str, eta: float) -> Callable[..., Tensor]:
    if name not in SAMPLERS:
        raise ValueError(f"the sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if eta and name != "ddim":
        raise ValueError(f"eta belongs to the sampler 'ddim'; {name!r} has none")
    return partial(SAMPLERS[name], eta=eta) if eta else SAMPLERS[name]


def _sizes(model: Model, size: int | tuple[int, int] | None) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """(height and width in pixels, the shape of one picture's latents)"""
    channels, takes = model.vae.config.latent_channels, model.unet.settings["in_channels"]
    if takes != channels or model.unet.class_embedding is not None:
        raise ValueError(
            f"this UNet reads {takes} channels where its latents have {channels}, or classes too, as models for "
            f"inpainting and enlarging do; sample() draws from a prompt alone"
        )
    factor = latent_factor(model)
    size = own_size(model) if size is None else size
    height, width = (size, size) if isinstance(size, int) else (int(s) for s in size)
    if min(height, width) < factor or height % factor or width % factor:
        raise ValueError(f"size must be multiples of {factor} pixels for this model, not {height} x {width}")
    return (height, width), (channels, height // factor, width // factor)


class _Steps:
    """Counts the steps of all batches: for the progress bar, and for a callback that may end the call."""

    def __init__(self, on_step: Callable[[int, int, Tensor], object] | None, total: int, progress: bool) -> None:
        self.on_step, self.total, self.done, self.stopped = on_step, total, 0, False
        self.progress, self.bar = progress, None

    def __enter__(self) -> _Steps:
        if self.progress:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=self.total, desc="drawing", unit="step")
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, step: int, steps: int, x: Tensor) -> bool:
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
