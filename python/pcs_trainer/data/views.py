"""What is shown of a photo before any augmentation: squares of it at random places, and its mirror image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from .pictures import Picture

if TYPE_CHECKING:
    from ..settings import Settings

CROPS = 8  # squares of a photo: photos are encoded once, before training, and eight show what lies beside the middle


def views(pictures: Sequence[Picture], s: Settings, generator: torch.Generator) -> list[Picture]:
    """The pictures as the settings show them, as many of each.

    Args:
        pictures: with their masks.
        s: crop and flip.
        generator: draws the places of the squares.
    """
    shown = list(pictures)
    if s.crop == "random":
        shown = [_square(picture, generator) for _ in range(CROPS) for picture in shown]
    return [*shown, *map(_mirrored, shown)] if s.flip else shown


def _square(picture: Picture, generator: torch.Generator) -> Picture:
    """A square of the shorter side at a random place; a square picture as it is."""
    height, width = picture.pixels.shape[:2]
    side = min(height, width)
    top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in (height, width))
    at = slice(top, top + side), slice(left, left + side)
    mask = None if picture.mask is None else picture.mask[at]
    return replace(picture, pixels=np.ascontiguousarray(picture.pixels[at]), mask=mask)


def _mirrored(picture: Picture) -> Picture:
    mask = None if picture.mask is None else np.ascontiguousarray(picture.mask[:, ::-1])
    return replace(picture, pixels=np.ascontiguousarray(picture.pixels[:, ::-1]), mask=mask)
