"""The commands of `pcs`, one module each; a module is imported when its command is called, and torch when it runs."""

from __future__ import annotations

from importlib import import_module

from ...errors import UsageError
from ..options import Command, meant

COMMANDS = {
    "demo": "learn the example subject by several methods and write a report",
    "train": "learn a subject from a few photos",
    "sample": "draw pictures with what was learned",
    "merge": "join several concepts into one, without training",
    "export": "write a concept for diffusers, ComfyUI or A1111, or as a whole pipeline",
    "plan": "what a training needs in memory, and the fastest plan within a budget",
    "evaluate": "how like the photos and how true to the prompts the pictures are",
    "doctor": "what this machine has, what is used, and what to do about the rest",
    "bench": "time training and drawing on this machine",
    "completion": "print a completion script for bash, zsh or fish",
}


def command(name: str) -> Command:
    if name not in COMMANDS:
        raise UsageError(f"{name} is no command of pcs{meant(name, COMMANDS) or '; pcs --help shows all commands'}")
    return import_module(f".{name}", __name__).COMMAND
