"""The commands of `pcs`, one module each; a module is imported when its command is called, and torch when it runs."""

from __future__ import annotations

from importlib import import_module

from ...errors import UsageError
from ..options import Command, meant

COMMANDS = {
    "demo": "learn the example subject by several methods and write a report",
    "train": "learn a subject from a few photos",
    "retrieve": "class images for training out of your own pictures, by their similarity to a prompt",
    "sample": "sample images with learned concepts",
    "upscale": "enlarge pictures by an up-scaler and what it has learned of a subject",
    "merge": "merge several concepts into one, without training",
    "export": "export a concept for diffusers, ComfyUI or A1111, or as a whole pipeline",
    "plan": "memory of every phase of a run, and the fastest recomputation plan within a budget",
    "evaluate": "subject fidelity, prompt fidelity and class drift of a concept",
    "doctor": "what this machine has, what is used of it, and one thing to do about the rest",
    "bench": "time training and sampling on this machine",
    "completion": "print a completion script for bash, zsh or fish",
}


def command(name: str) -> Command:
    """A command by its name; UsageError, with the nearest name, where there is none."""
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name}{meant(name, COMMANDS) or '; pcs --help shows all commands'}")
    return import_module(f".{name}", __name__).COMMAND
