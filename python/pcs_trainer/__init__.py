"""Personalizing Stable Diffusion: the UNet, the models and the trainer on top of pcs_kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .concept import Concept as Concept
    from .concept import load_concept as load_concept
    from .events import Event as Event
    from .export import export as export
    from .importing import import_concept as import_concept
    from .lag import Lag as Lag
    from .lag import Maps as Maps
    from .layers import LowRank as LowRank
    from .memory import Plan as Plan
    from .memory import plan as plan
    from .merge import blend as blend
    from .merge import compress as compress
    from .merge import merge as merge
    from .model import Model as Model
    from .model import load_model as load_model
    from .sampling import decode as decode
    from .sampling import sample as sample
    from .schedule import Schedule as Schedule
    from .settings import Settings as Settings
    from .trainer import Trainer as Trainer
    from .trainer import TrainingStopped as TrainingStopped
    from .trainer import trainable as trainable
    from .unet import UNet as UNet

# Public names and the modules that hold them; a module is imported when one of its names is used.
_PUBLIC = {
    "Concept": "concept",
    "Event": "events",
    "Lag": "lag",
    "LowRank": "layers",
    "Model": "model",
    "Schedule": "schedule",
    "Settings": "settings",
    "Trainer": "trainer",
    "TrainingStopped": "trainer",
    "UNet": "unet",
    "Maps": "lag",
    "Plan": "memory",
    "blend": "merge",
    "compress": "merge",
    "decode": "sampling",
    "export": "export",
    "import_concept": "importing",
    "load_concept": "concept",
    "load_model": "model",
    "merge": "merge",
    "plan": "memory",
    "sample": "sampling",
    "trainable": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = found  # also where a module has the name of the function in it: the function wins
    return found
