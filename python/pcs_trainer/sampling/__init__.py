"""Concepts to images: samplers, up-scaling, localized attention-guided sampling (LAG), captured attention maps.

Importing this package imports no torch, so that the command line can read the samplers' names from it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .names import NAMES as NAMES

if TYPE_CHECKING:
    from .drawing import Drawing as Drawing
    from .drawing import SampleOptions as SampleOptions
    from .drawing import draw as draw
    from .drawing import sample as sample
    from .lag import Lag as Lag
    from .maps import Maps as Maps
    from .scene import make_scene as make_scene
    from .upscaling import upscale as upscale

_HOME = {  # imported when first used
    "Drawing": "drawing",
    "SampleOptions": "drawing",
    "draw": "drawing",
    "sample": "drawing",
    "Lag": "lag",
    "Maps": "maps",
    "make_scene": "scene",
    "upscale": "upscaling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
