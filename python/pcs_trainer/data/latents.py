"""Pictures in the autoencoder's terms: each is encoded once, and its latents are drawn anew from mean and deviation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .pictures import to_tensor

if TYPE_CHECKING:
    from ..model.model import Model


@dataclass
class Moments:
    """What the autoencoder says of n pictures: mean and std [n, C, h, w] of their latents, already scaled."""

    mean: Tensor
    std: Tensor

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Fresh latents of some of the pictures."""
        mean, std = self.mean[index], self.std[index]
        return mean + std * torch.randn(mean.shape, generator=generator)


def latent_factor(model: Model) -> int:
    """Pixels a latent pixel, a side."""
    return 2 ** (len(model.vae.config.block_out_channels) - 1)


def own_size(model: Model) -> tuple[int, int]:
    """The height and width in pixels that the model was made for."""
    side = model.unet.config.get("sample_size") or 64
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return latent_factor(model) * int(height), latent_factor(model) * int(width)


@torch.no_grad()
def encode_pictures(model: Model, pictures: Sequence[np.ndarray], batch: int = 8) -> Moments:
    """The moments of equally large uint8 pictures, in float32 on the CPU."""
    vae = model.vae
    like = next(vae.parameters())
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    means, stds = [], []
    for start in range(0, len(pictures), batch):
        x = torch.stack([to_tensor(p) for p in pictures[start : start + batch]]).to(like)
        posterior = vae.encode(x).latent_dist
        means.append(((posterior.mean.float() - shift) * scale).cpu())
        stds.append((posterior.std.float() * scale).cpu())
    moments = Moments(torch.cat(means), torch.cat(stds))
    if not (torch.isfinite(moments.mean).all() and torch.isfinite(moments.std).all()):
        raise ValueError("the autoencoder gives NaN for these pictures; load the model in float32")
    return moments


def cache_folder() -> Path:
    """Where what can be made again is kept: PCS_CACHE, else the user's cache folder."""
    base = os.environ.get("PCS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pcs"
    return Path(base)


def cached_moments(model: Model, pictures: Sequence[np.ndarray]) -> Moments:
    """`encode_pictures`, kept on disk by the content of the pictures and of the autoencoder."""
    from safetensors.torch import load_file

    from ..concept.concept import fingerprint
    from ..concept.file import write_whole

    content = hashlib.sha256(fingerprint(model).encode())
    content.update(json.dumps({k: str(v) for k, v in sorted(model.vae.config.items())}).encode())
    content.update(str(next(model.vae.parameters()).dtype).encode())
    for picture in pictures:
        content.update(str(picture.shape).encode())
        content.update(np.ascontiguousarray(picture).tobytes())
    file = cache_folder() / "moments" / f"{content.hexdigest()[:32]}.safetensors"
    if file.is_file():
        kept = load_file(file)
        return Moments(kept["mean"], kept["std"])
    moments = encode_pictures(model, pictures)
    with suppress(OSError):  # a cache that cannot be kept costs the next run some seconds, and this one nothing
        write_whole(file, {"mean": moments.mean, "std": moments.std}, {})
    return moments
