"""Personalizing Stable Diffusion: the UNet, the models and the trainer on top of pcs_kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .layers import LowRank as LowRank
    from .model import Model as Model
    from .model import load_model as load_model
    from .schedule import Schedule as Schedule
    from .unet import UNet as UNet

# Public names and the modules that hold them; a module is imported when one of its names is used.
_PUBLIC = {"LowRank": "layers", "Model": "model", "Schedule": "schedule", "UNet": "unet", "load_model": "model"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
