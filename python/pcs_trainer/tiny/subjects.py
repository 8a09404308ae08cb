"""Subjects: objects of a known class whose look no caption can name, and photographs of them.

`subject(seed)` draws a class, a two-tone pattern, a trim colour, an emblem, a grip and proportions;
`photos(seed, n)` shows the same object in other places, poses and light, with captions that keep the secret.
"""

import colorsys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import captions
from .shapes import CLASSES, EMBLEMS, HANDLES
from .surface import SUBJECT_PATTERNS
from .world import BACKGROUNDS, Look, Scene, render, scene, with_look

_SUBJECT_STREAM, _PHOTO_STREAM = 11, 13  # random streams apart from each other and from the scenes' of the same seed


@dataclass(frozen=True)
class Subject:
    """A class word and the look that goes with it."""

    kind: str
    look: Look
    seed: int


@dataclass(frozen=True)
class Photo:
    """A picture of a subject with the caption that a stranger would write and the truth about the rest."""

    picture: NDArray[np.uint8]
    caption: str
    scene: Scene


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1.0, saturation, value))


def subject(seed: int, kind: str | None = None) -> Subject:
    """The subject of this seed; `kind` pins its class."""
    rng = np.random.default_rng([int(seed), _SUBJECT_STREAM])
    drawn = str(rng.choice(CLASSES))
    hue = rng.uniform()
    dark = rng.uniform() < 0.5
    first = _rgb(hue, rng.uniform(0.65, 0.95), rng.uniform(0.35, 0.6) if dark else rng.uniform(0.85, 1.0))
    other = hue + rng.uniform(0.2, 0.8)
    second = _rgb(other, rng.uniform(0.35, 0.9), rng.uniform(0.9, 1.0) if dark else rng.uniform(0.3, 0.55))
    trim = _rgb(hue + rng.uniform(0.25, 0.75), rng.uniform(0.6, 1.0), rng.uniform(0.5, 1.0))
    badge = _rgb(hue + rng.choice((0.33, 0.5, 0.66)), rng.uniform(0.0, 1.0), 1.0)
    look = Look(
        first,
        second,
        str(rng.choice(SUBJECT_PATTERNS)),
        int(rng.integers(2)),
        trim,
        str(rng.choice(HANDLES)),
        (float(rng.choice((0.8, 0.95, 1.1))), float(rng.choice((0.8, 0.95, 1.08)))),
        str(rng.choice(EMBLEMS)),
        badge,
    )
    return Subject(kind or drawn, look, int(seed))


def photos(seed: int, n: int, kind: str | None = None, background: str | None = None, first: int = 0) -> list[Photo]:
    """Photographs of a subject.

    Args:
        seed: the subject's seed.
        n: number of photographs.
        kind: class of the subject; default: what its seed says.
        background: one place for all of them; default: a random one each.
        first: number of the first photograph; each depends on its number alone.
    """
    it = subject(seed, kind)
    result = []
    for index in range(first, first + n):
        rng = np.random.default_rng([int(seed), _PHOTO_STREAM, index])
        place = background or str(rng.choice(BACKGROUNDS))
        shot = scene(
            int(rng.integers(2**31)),
            kind=it.kind,
            background=place,
            style="photo",
            scale=str(rng.choice(("medium", "large"), p=(0.7, 0.3))),
        )
        shot = with_look(shot, it.look)
        result.append(Photo(render(shot), captions.caption(shot, rng).text, shot))
    return result
