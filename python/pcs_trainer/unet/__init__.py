"""The network: a hand-written UNet of the Stable Diffusion family on the ops of pcs_kernels.

Importing this package imports no torch, so that the command line can read the names of the memory plans from it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .plans import PLAN_NAMES as PLAN_NAMES
from .plans import short_plan as short_plan

if TYPE_CHECKING:
    from .layers import LowRank as LowRank
    from .unet import UNet as UNet

_HOME = {"LowRank": "layers", "UNet": "unet"}  # imported when first used


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
