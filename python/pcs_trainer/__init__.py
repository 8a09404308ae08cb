"""Personalize text-to-image diffusion models from a few photos."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Public name -> the room it lives in, imported when the name is first used: `import pcs_trainer` needs no torch.
# No public name is the name of a module of this package, so none of them can turn into a module.
_HOME = {
    "load_model": "model",
    "Model": "model",
    "Schedule": "model",
    "decode": "model",
    "UNet": "unet",
    "LowRank": "unet",
    "Settings": "settings",
    "Trainer": "training",
    "Event": "training",
    "trainable": "training",
    "NotSaved": "errors",
    "NotTrained": "errors",
    "PcsError": "errors",
    "TrainingStopped": "errors",
    "UnsupportedModel": "errors",
    "sample": "sampling",
    "upscale": "sampling",
    "Lag": "sampling",
    "Maps": "sampling",
    "Concept": "concept",
    "load_concept": "concept",
    "merge": "concept",
    "blend": "concept",
    "compress": "concept",
    "export": "concept.formats",
    "import_concept": "concept.formats",
    "plan": "memory",
    "Plan": "memory",
    "evaluate": "evaluation",
    "Scores": "evaluation",
    "retrieve": "evaluation",
}
__all__ = sorted(_HOME)  # type: ignore[reportUnsupportedDunderAll]  # __init__.pyi spells them for editors


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"] if "__version__" in globals() else list(__all__)
