"""Personalizing Stable Diffusion: the UNet, the models and the trainer on top of pcs_kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .concept.concept import Concept as Concept
    from .concept.concept import load_concept as load_concept
    from .concept.formats.reading import import_concept as import_concept
    from .concept.formats.writing import export as export
    from .concept.merging import blend as blend
    from .concept.merging import compress as compress
    from .concept.merging import merge as merge
    from .memory.planner import Plan as Plan
    from .memory.planner import plan as plan
    from .model.model import Model as Model
    from .model.model import load_model as load_model
    from .model.schedule import Schedule as Schedule
    from .sampling.drawing import decode as decode
    from .sampling.drawing import sample as sample
    from .sampling.lag import Lag as Lag
    from .sampling.lag import Maps as Maps
    from .settings import Settings as Settings
    from .training.events import Event as Event
    from .training.trainer import Trainer as Trainer
    from .training.trainer import TrainingStopped as TrainingStopped
    from .training.trainer import trainable as trainable
    from .unet.layers import LowRank as LowRank
    from .unet.unet import UNet as UNet

# Public names and the modules that hold them; a module is imported when one of its names is used.
_PUBLIC = {
    "Concept": "concept.concept",
    "Event": "training.events",
    "Lag": "sampling.lag",
    "LowRank": "unet.layers",
    "Model": "model.model",
    "Schedule": "model.schedule",
    "Settings": "settings",
    "Trainer": "training.trainer",
    "TrainingStopped": "training.trainer",
    "UNet": "unet.unet",
    "Maps": "sampling.lag",
    "Plan": "memory.planner",
    "blend": "concept.merging",
    "compress": "concept.merging",
    "decode": "sampling.drawing",
    "export": "concept.formats.writing",
    "import_concept": "concept.formats.reading",
    "load_concept": "concept.concept",
    "load_model": "model.model",
    "merge": "concept.merging",
    "plan": "memory.planner",
    "sample": "sampling.drawing",
    "trainable": "training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = found  # also where a module has the name of the function in it: the function wins
    return found
