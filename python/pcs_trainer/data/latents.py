"""The cache of encoded images: the moments of their latents on disk, named by the content they were made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..model.autoencoder import Moments, encode_images

if TYPE_CHECKING:
    from ..model.model import Model


def cache_folder() -> Path:
    """Where what can be made again is kept: PCS_CACHE, else the user's cache folder."""
    base = os.environ.get("PCS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pcs"
    return Path(base)


def cached_moments(model: Model, pictures: Sequence[np.ndarray]) -> Moments:
    """`encode_images`, kept on disk by the content of the images and of the autoencoder."""
    from safetensors.torch import load_file

    from ..files import write_safetensors
    from ..model.fingerprint import fingerprint, weights_mark

    content = hashlib.sha256(fingerprint(model).encode())
    content.update(json.dumps({k: str(v) for k, v in sorted(model.vae.config.items())}).encode())
    content.update(weights_mark(model.vae).encode())
    for picture in pictures:
        content.update(str(picture.shape).encode())
        content.update(np.ascontiguousarray(picture).tobytes())
    file = cache_folder() / "moments" / f"{content.hexdigest()[:32]}.safetensors"
    if file.is_file():
        kept = load_file(file)
        return Moments(kept["mean"], kept["std"])
    moments = encode_images(model, pictures)
    with suppress(OSError):  # a cache that cannot be kept costs the next run some seconds, and this one nothing
        write_safetensors(file, {"mean": moments.mean, "std": moments.std}, {})
    return moments
