"""Images to latents and back, by a model's autoencoder.

Letters: P images, C latent channels, h x w latent positions, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .bands import in_bands
from .products import on_our_products
from .turns import turn

if TYPE_CHECKING:
    from PIL.Image import Image

    from .model import Model
    from .peers import Autoencoder

DEFAULT_SIDE = 64  # latents a side where a configuration gives none: those are of the first models, made for 512 pixels
# Pixels in one call of the autoencoder, beyond its first image: what it makes of eight of 1024 x 1024 grows with them.
AT_ONCE = 512 * 512


def at_once(pixels: int, most: int) -> int:
    """How many images of so many pixels are worked on together, of `most`."""
    return min(most, max(1, AT_ONCE // pixels))


@dataclass
class Moments:
    """What the autoencoder says of P images: mean and std [P, C, h, w] of their latents, already scaled."""

    mean: Tensor
    std: Tensor

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Fresh latents of some of the images."""
        mean, std = self.mean[index], self.std[index]
        return mean + std * torch.randn(mean.shape, generator=generator)


def latent_factor(model: Model) -> int:
    """Pixels per latent position, along a side."""
    return 2 ** (len(model.vae.config.block_out_channels) - 1)


def own_size(model: Model) -> tuple[int, int]:
    """The height and width in pixels that the model was made for."""
    side = model.unet.config.get("sample_size") or DEFAULT_SIDE
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return latent_factor(model) * int(height), latent_factor(model) * int(width)


def _scaling(vae: Autoencoder) -> tuple[float, float]:
    """(shift, scale): the UNet's latents are (the autoencoder's - shift) * scale."""
    return getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> float [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 127.5 - 1.0


@contextmanager
def _upcast(model: Model, halves: tuple[torch.dtype, ...]) -> Iterator[Autoencoder]:
    """The autoencoder, in float32 for as long as the context is open where it is one of `halves` and asks for that.

    SDXL's own overflows in float16 and says force_upcast; the files of SD 1.x and 2.x leave diffusers' default, which
    their pipelines do not read. The weights are the same bits afterwards: float32 holds each half exactly.
    """
    vae = model.vae
    was = next(vae.parameters()).dtype
    asked = model.unet.add_embedding is not None and getattr(vae.config, "force_upcast", True)
    if not asked or was not in halves:
        yield vae
        return
    module: Any = vae
    try:
        yield nn.Module.to(module, torch.float32)  # diffusers' own `to` warns of it
    finally:
        nn.Module.to(module, was)


@torch.no_grad()
def encode_images(model: Model, images: Sequence[np.ndarray], batch: int = 8) -> Moments:
    """Encode images.

    Args:
        model: its autoencoder is used.
        images: uint8 [H, W, 3], all of one size.
        batch: images encoded at once, at most; fewer where they are large.

    Returns:
        Their moments, in float32 on the CPU; ValueError where they are not finite.
    """
    shift, scale = _scaling(model.vae)
    means, stds = [], []
    pixels = images[0][..., 0].size if images else 0
    count = at_once(pixels, batch) if images else batch
    halves = (torch.float16, torch.bfloat16)
    # SDXL's photos take 3 GB in float32 beside the UNet's 5. Latents to learn from: rounding would stay in them.
    with turn(model, "vae", alone=True), _upcast(model, halves) as vae, in_bands(vae, pixels), on_our_products(vae):
        like = next(vae.parameters())
        for start in range(0, len(images), count):
            x = torch.stack([to_tensor(p) for p in images[start : start + count]]).to(like)  # [P, 3, H, W]
            posterior = vae.encode(x).latent_dist
            means.append(((posterior.mean.float() - shift) * scale).cpu())
            stds.append((posterior.std.float() * scale).cpu())
    moments = Moments(torch.cat(means), torch.cat(stds))
    if not (torch.isfinite(moments.mean).all() and torch.isfinite(moments.std).all()):
        raise ValueError("the autoencoder gives NaN for these images; load the model in float32")
    return moments


@torch.no_grad()
def decode(model: Model, latents: Tensor) -> list[Image]:
    """The images of latents [P, C, h, w]; ValueError where the autoencoder's output is not finite."""
    from PIL import Image

    factor, (shift, scale) = latent_factor(model), _scaling(model.vae)
    pixels = latents.shape[2] * latents.shape[3] * factor**2
    count = at_once(pixels, len(latents) or 1)
    images = []
    with turn(model, "vae"), _upcast(model, (torch.float16,)) as vae, in_bands(vae, pixels), on_our_products(vae):
        like = next(vae.parameters())
        for part in latents.split(count):
            z = (part.float() / scale + shift).to(like)
            y = vae.decode(z.contiguous(memory_format=torch.channels_last)).sample.float()  # [P, 3, H, W]
            if not bool(torch.isfinite(y).all()):
                raise ValueError("the autoencoder gives NaN for these latents; load the model in float32 or bfloat16")
            pixels = ((y.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            images += [Image.fromarray(p) for p in pixels]
    return images
