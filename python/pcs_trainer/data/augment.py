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
# A fifth of TextBoost's pictures and two fifths of Custom Diffusion's show all: by then the subject is seen.
TRIES = 100
SMALLEST_MASK = 1.0  # latent pixels: the loss is a mean over the mask, and less than one says little about a subject
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
LONGEST_PREFIX = 5  # token embeddings in front of a prompt: of a change of place or size, a collage and grayscale


@dataclass
class Shown:
    """A picture uint8 [H, W, 3], and beside it the mask [H, W] of the subject in it, which every change takes along."""

    pixels: np.ndarray
    mask: np.ndarray | None = None

    def fitted(self, size: int) -> Shown:
        """size x size: the shorter side scaled to size, the middle cut out."""
        mask = None if self.mask is None else _box(fitted_mask(self.mask), size)
        return Shown(fitted(self.pixels, size), mask)

    def resized(self, size: int) -> Shown:
        """size x size, whatever the shape was."""
        return Shown(resized(self.pixels, size), None if self.mask is None else _box(self.mask, size))

    def cut(self, top: int, left: int, size: int) -> Shown:
        """The square of this size at a place."""
        rows, columns = slice(top, top + size), slice(left, left + size)
        mask = None if self.mask is None else self.mask[rows, columns]
        return Shown(np.ascontiguousarray(self.pixels[rows, columns]), mask)

    def padded(self, top: int, bottom: int, left: int, right: int) -> Shown:
        """The picture with its edges drawn out; they are not of the subject."""
        around = ((top, bottom), (left, right))
        mask = None if self.mask is None else np.pad(self.mask, around)
        return Shown(np.pad(self.pixels, (*around, (0, 0)), mode="edge"), mask)

    def flipped(self) -> Shown:
        """Left is right."""
        mask = None if self.mask is None else self.mask[:, ::-1]
        return Shown(np.ascontiguousarray(self.pixels[:, ::-1]), mask)

    def tiled(self, tiles: int, size: int) -> Shown:
        """tiles x tiles of the picture, cut to size x size."""
        mask = None if self.mask is None else np.tile(self.mask, (tiles, tiles))[:size, :size]
        return Shown(np.tile(self.pixels, (tiles, tiles, 1))[:size, :size], mask)


@dataclass
class Augmented:
    """A square picture and what its prompt begins with.

    mask: at the latents' size, what of the picture is real (None: all). subject: the subject's own mask, moved as the
    picture was, where there is one.
    """

    pixels: np.ndarray
    prefix: str = ""
    mask: np.ndarray | None = None
    subject: np.ndarray | None = None


# (picture, size, latent size, generator)
Change = Callable[[Shown, int, int, torch.Generator], Augmented]


@dataclass(frozen=True)
class Augmentation:
    """How a method varies its photos: `count` pictures are prepared before training."""

    change: Change
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


def custom_diffusion(picture: Shown, size: int, latent: int, generator: torch.Generator) -> Augmented:
    """Custom Diffusion's change of size at `size` pixels and `latent` latent pixels a side."""
    smaller = float(torch.rand((), generator=generator)) < 2 / 3
    s = int(uniform(generator, size / 3, size) if smaller else uniform(generator, 1.2 * size, 1.4 * size))
    square = picture.fitted(min(picture.pixels.shape[:2]))
    if s < 0.6 * size:
        return _far_away(square, s, size, latent, generator)
    if s <= size:
        return _augmented(square.resized(size))
    top, left = (int(torch.randint(s - size + 1, (), generator=generator)) for _ in range(2))
    return _augmented(square.resized(s).cut(top, left, size), str(chosen(generator, NEAR)))


def _augmented(shown: Shown, prefix: str = "") -> Augmented:
    """A picture of which everything is real."""
    return Augmented(np.ascontiguousarray(shown.pixels), prefix, None, shown.mask)


def _far_away(square: Shown, s: int, size: int, latent: int, generator: torch.Generator) -> Augmented:
    """Pasted small on mid-grey; the mask is the pasted box less one latent pixel a side."""
    canvas = np.full((size, size, 3), 127, np.uint8)
    top, left = (int(torch.randint(size - s + 1, (), generator=generator)) for _ in range(2))
    small = square.resized(s)
    canvas[top : top + s, left : left + s] = small.pixels
    factor = size // latent
    mask = np.zeros((latent, latent), np.float32)
    rows, columns = (slice(at // factor + 1, max(at // factor + 2, (at + s) // factor - 1)) for at in (top, left))
    mask[rows, columns] = 1
    after = size - s
    subject = None if small.mask is None else np.pad(small.mask, ((top, after - top), (left, after - left)))
    return Augmented(canvas, str(chosen(generator, FAR)), mask, subject)


def textboost(picture: Shown, size: int, probability: float, generator: torch.Generator) -> Augmented:
    """One geometric change with `probability`, then a collage with it, then grayscale in one picture of five."""
    shown, said = picture.fitted(size), []
    if float(torch.rand((), generator=generator)) < probability:
        change = chosen(generator, (_scaled, _cropped, _moved, _flipped))
        if change in (_scaled, _cropped):  # enlarge a part: from the photo as it is, as far as its pixels are seen
            shown = picture.fitted(max(size, min(*picture.pixels.shape[:2], round(LARGER * size))))
        shown, name = change(shown, generator)  # type: ignore[operator]
        shown = shown if len(shown.pixels) == size else shown.resized(size)
        said += [name] if name else []
    if float(torch.rand((), generator=generator)) < probability:
        tiles = int(torch.randint(2, 4, (), generator=generator))
        # Its code draws a black line of one pixel around each tile before the photo is reduced: of a photo of 3,000
        # pixels, a third of a pixel's grey at 512. Left out: it says nothing of the subject, and a run that goes on
        # makes its pictures anew, which would no longer be those that it began with.
        shown = shown.resized(-(-size // tiles)).tiled(tiles, size)
        said.append("collage")
    if float(torch.rand((), generator=generator)) < 0.2:
        grey = shown.pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        shown = Shown(np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2), shown.mask)
        said.append("grayscale")
    return _augmented(shown, "".join(f"{word(name)} " for name in said))


def _scaled(picture: Shown, generator: torch.Generator) -> tuple[Shown, str]:
    size, scale = len(picture.pixels), uniform(generator, 0.34, 1.4)
    s = max(1, round(size * scale))
    changed = picture.resized(s)
    if s >= size:
        at = (s - size) // 2
        return changed.cut(at, at, size), "zoom-in" if scale > 1.2 else ""
    before = (size - s) // 2
    after = size - s - before
    return changed.padded(before, after, before, after), "far-away" if scale < 0.6 else ""


def _cropped(picture: Shown, generator: torch.Generator) -> tuple[Shown, str]:
    size = len(picture.pixels)
    s = max(1, round(size * uniform(generator, LEAST_CROP, 1.0) ** 0.5))
    top, left = (int(torch.randint(size - s + 1, (), generator=generator)) for _ in range(2))
    return picture.cut(top, left, s).resized(size), "crop"


def _moved(picture: Shown, generator: torch.Generator) -> tuple[Shown, str]:
    size, share = len(picture.pixels), uniform(generator, 0.15, 0.30)
    by = max(1, round(size * share))
    mask = picture.mask
    if float(torch.rand((), generator=generator)) < 0.5:
        rest = Shown(picture.pixels[:, by:], None if mask is None else mask[:, by:])
        return rest.padded(0, 0, 0, by), "left"
    rest = Shown(picture.pixels[:, :-by], None if mask is None else mask[:, :-by])
    return rest.padded(0, 0, by, 0), "right"


def _flipped(picture: Shown, _generator: torch.Generator) -> tuple[Shown, str]:
    return picture.flipped(), "flip"


def varied(picture: Shown, size: int, latent: int, change: Change | None, generator: torch.Generator) -> Augmented:
    """A picture changed so that its subject, where a mask says which it is, is still in it.

    Args:
        picture: with the subject's mask, if there is one.
        size, latent: pixels and latent pixels a side.
        change: how it is varied; None cuts out the middle square alone.
        generator: decides.

    Raises:
        ValueError: what is trained on holds nothing of the subject.
    """
    whole = _augmented(picture.fitted(size))
    if not _shows_subject(whole, latent):
        raise ValueError(
            f"its mask leaves less than one of {latent} x {latent} latent pixels in the middle square, and only that "
            "is trained on; crop the picture around the subject, or correct the mask"
        )
    for _ in range(TRIES) if change is not None else ():
        shown = change(picture, size, latent, generator)
        if _shows_subject(shown, latent):
            return shown
    return whole


def _shows_subject(shown: Augmented, latent: int) -> bool:
    """Whether anything of the subject counts in the loss; true where no mask says which it is."""
    return shown.subject is None or float(training_mask(shown, latent).sum()) >= SMALLEST_MASK


def training_mask(shown: Augmented, latent: int) -> Tensor:
    """What of a picture counts in the loss, [1, latent, latent]: what is real, and of that the subject."""
    return mask_tensor(shown.mask, latent) * mask_tensor(shown.subject, latent)


def mask_tensor(mask: np.ndarray | None, latent: int) -> Tensor:
    """A picture's mask at latent size, [1, latent, latent]; all ones where there is none."""
    if mask is None:
        return torch.ones(1, latent, latent)
    return torch.from_numpy(np.array(_box(fitted_mask(mask), latent), np.float32))[None]


def _box(mask: np.ndarray, size: int) -> np.ndarray:
    """A square mask at size x size: the mean of what each place covers."""
    from PIL import Image

    if mask.shape == (size, size):
        return mask
    picture = Image.fromarray(np.ascontiguousarray(mask, np.float32))
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX))


def fitted_mask(mask: np.ndarray) -> np.ndarray:
    """The middle square of a mask: what `fitted` leaves of its picture."""
    height, width = mask.shape
    s = min(height, width)
    top, left = (height - s) // 2, (width - s) // 2
    return mask[top : top + s, left : left + s]
