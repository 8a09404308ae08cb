"""Augmentations that say in the prompt what was done to the picture, so that it is not learned as the subject.

Custom Diffusion's: another size, with a prefix and the latent mask of what is real.  TextBoost's: one geometric change,
collages, grayscale, each with words of its own that are learned too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .pictures import fitted

LEAST_CROP = 0.08  # of the picture's area
LARGER = LEAST_CROP**-0.5  # a picture of so many times the size has the pixels of its smallest crop
FAR, NEAR = ("a far away ", "very small "), ("zoomed in ", "close up ")
# TextBoost's augmentation words: name -> what its rows start from and how many they are (12 in all).
WORDS = {
    "grayscale": ("grayscale", 2),
    "zoom-in": ("zoom in", 2),
    "far-away": ("far away", 2),
    "collage": ("photo collage", 2),
    "crop": ("crop", 1),
    "flip": ("horizontal flip", 1),
    "left": ("left", 1),
    "right": ("right", 1),
}


@dataclass
class Augmented:
    """A square picture, what its prompt begins with, and the latent mask of what may be learned from (None: all)."""

    pixels: np.ndarray
    prefix: str = ""
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Augmentation:
    """How a method varies its photos: `count` pictures are prepared before training."""

    change: Callable[[np.ndarray, int, int, torch.Generator], Augmented]  # (pixels, size, latent size, generator)
    count: int


def word(name: str) -> str:
    """The learned word for one of TextBoost's augmentations."""
    return f"<aug-{name}>"


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """A random number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def chosen(generator: torch.Generator, options: tuple) -> object:
    """One of the options at random."""
    return options[int(torch.randint(len(options), (), generator=generator))]


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """size x size, whatever the shape was."""
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS))


def custom_diffusion(pixels: np.ndarray, size: int, latent: int, generator: torch.Generator) -> Augmented:
    """Custom Diffusion's change of size at `size` pixels and `latent` latent pixels a side."""
    smaller = float(torch.rand((), generator=generator)) < 2 / 3
    s = int(uniform(generator, size / 3, size) if smaller else uniform(generator, 1.2 * size, 1.4 * size))
    square = fitted(pixels, min(pixels.shape[:2]))
    if s < 0.6 * size:
        return _far_away(square, s, size, latent, generator)
    if s <= size:
        return Augmented(resized(square, size))
    large = resized(square, s)
    top, left = (int(torch.randint(s - size + 1, (), generator=generator)) for _ in range(2))
    return Augmented(large[top : top + size, left : left + size], str(chosen(generator, NEAR)))


def _far_away(square: np.ndarray, s: int, size: int, latent: int, generator: torch.Generator) -> Augmented:
    """Pasted small on mid-grey; the mask is the pasted box less one latent pixel a side."""
    canvas = np.full((size, size, 3), 127, np.uint8)
    top, left = (int(torch.randint(size - s + 1, (), generator=generator)) for _ in range(2))
    canvas[top : top + s, left : left + s] = resized(square, s)
    factor = size // latent
    mask = np.zeros((latent, latent), np.float32)
    rows, columns = (slice(at // factor + 1, max(at // factor + 2, (at + s) // factor - 1)) for at in (top, left))
    mask[rows, columns] = 1
    return Augmented(canvas, str(chosen(generator, FAR)), mask)


def textboost(pixels: np.ndarray, size: int, probability: float, generator: torch.Generator) -> Augmented:
    """One geometric change with `probability`, then a collage with it, then grayscale in one picture of five."""
    picture, said = fitted(pixels, size), []
    if float(torch.rand((), generator=generator)) < probability:
        change = chosen(generator, (_scaled, _cropped, _moved, _flipped))
        if change in (_scaled, _cropped):  # enlarge a part: from the photo as it is, as far as its pixels are seen
            picture = fitted(pixels, max(size, min(*pixels.shape[:2], round(LARGER * size))))
        picture, name = change(picture, generator)  # type: ignore[operator]
        picture = picture if len(picture) == size else resized(np.ascontiguousarray(picture), size)
        said += [name] if name else []
    if float(torch.rand((), generator=generator)) < probability:
        tiles = int(torch.randint(2, 4, (), generator=generator))
        tile = resized(picture, -(-size // tiles))
        picture = np.tile(tile, (tiles, tiles, 1))[:size, :size]
        said.append("collage")
    if float(torch.rand((), generator=generator)) < 0.2:
        grey = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        picture = np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)
        said.append("grayscale")
    return Augmented(np.ascontiguousarray(picture), "".join(f"{word(name)} " for name in said))


def _scaled(picture: np.ndarray, generator: torch.Generator) -> tuple[np.ndarray, str]:
    size, scale = len(picture), uniform(generator, 0.34, 1.4)
    s = max(1, round(size * scale))
    changed = resized(picture, s)
    if s >= size:
        at = (s - size) // 2
        return changed[at : at + size, at : at + size], "zoom-in" if scale > 1.2 else ""
    before = (size - s) // 2
    pad = (before, size - s - before)
    return np.pad(changed, (pad, pad, (0, 0)), mode="edge"), "far-away" if scale < 0.6 else ""


def _cropped(picture: np.ndarray, generator: torch.Generator) -> tuple[np.ndarray, str]:
    size = len(picture)
    s = max(1, round(size * uniform(generator, LEAST_CROP, 1.0) ** 0.5))
    top, left = (int(torch.randint(size - s + 1, (), generator=generator)) for _ in range(2))
    return resized(np.ascontiguousarray(picture[top : top + s, left : left + s]), size), "crop"


def _moved(picture: np.ndarray, generator: torch.Generator) -> tuple[np.ndarray, str]:
    size, share = len(picture), uniform(generator, 0.15, 0.30)
    by = max(1, round(size * share))
    if float(torch.rand((), generator=generator)) < 0.5:
        return np.pad(picture[:, by:], ((0, 0), (0, by), (0, 0)), mode="edge"), "left"
    return np.pad(picture[:, :-by], ((0, 0), (by, 0), (0, 0)), mode="edge"), "right"


def _flipped(picture: np.ndarray, _generator: torch.Generator) -> tuple[np.ndarray, str]:
    return np.ascontiguousarray(picture[:, ::-1]), "flip"


def mask_tensor(mask: np.ndarray | None, latent: int) -> Tensor:
    """A picture's mask at latent size, [1, latent, latent]; all ones where there is none."""
    from PIL import Image

    if mask is None:
        return torch.ones(1, latent, latent)
    if mask.shape != (latent, latent):
        picture = Image.fromarray(np.rint(fitted_mask(mask) * 255).astype(np.uint8))
        mask = np.asarray(picture.resize((latent, latent), Image.Resampling.BOX), np.float32) / 255
    return torch.from_numpy(np.array(mask, np.float32))[None]


def fitted_mask(mask: np.ndarray) -> np.ndarray:
    """The middle square of a mask: what `fitted` leaves of its picture."""
    height, width = mask.shape
    s = min(height, width)
    top, left = (height - s) // 2, (width - s) // 2
    return mask[top : top + s, left : left + s]
