"""Checkpoints of a run: a folder each, there whole or not at all; the last few are kept; other runs are refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_safetensors, write_safetensors
from ..model.fingerprint import same_base
from ..run_folder import BEGUN, checkpoint_name, checkpoints, is_of, is_others, remove_folder, run_checkpoints, sweep
from ..settings import with_none_for_unset

IDENTITY = {"base", "base_name", "data", "settings"}  # what every version has written of a run
# What may change between a run and its resume.
FREE = (
    *("steps", "checkpoint_every", "keep", "preview_every", "preview_prompts"),
    *("probe_every", "plan", "packing", "offload", "resident", "states", "check_backend"),
)
# What says nothing while another setting is off.
ONLY_WITH = {"augment_probability": "augment", "bank": "augment"}


def write_checkpoint(out: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write out/checkpoint-N, whole or not at all, and remove the oldest, other runs' and what was left half.

    Args:
        out: the run's folder.
        step: N.
        tensors: what trains, by name.
        state: the run's identity, "step" and "optimizer".
        keep: how many checkpoints stay, this one among them.

    Raises:
        OSError: one sentence, where it could not be written.
    """
    folder = out / checkpoint_name(step)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    if is_others(folder):
        raise OSError(f"the checkpoint {folder} was not written: another program's files are there; move them away")
    sweep(out)
    try:
        part.mkdir(parents=True)
        write_safetensors(part / "trained.safetensors", tensors, {})
        torch.save(state.pop("optimizer"), part / "optimizer.pt")
        (part / "state.json").write_text(json.dumps(state, indent=1, default=str))
        remove_folder(folder)  # an earlier run's of that number
        part.rename(folder)
    except (OSError, RuntimeError) as error:  # torch.save says a full disk with a RuntimeError
        shutil.rmtree(part, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"the checkpoint {folder} could not be written ({reason})") from error
    others = [other for other in checkpoints(out) if other != folder]
    own = [other for other in others if is_of(other, state.get("run") or "")]
    kept = own[max(0, len(own) + 1 - keep) :]
    for old in others:
        if old not in kept:
            remove_folder(old)
    return folder


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trained tensors of a checkpoint and its state; ValueError where it cannot be read."""
    try:
        state = json.loads((folder / "state.json").read_text())
        state["optimizer"] = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"the checkpoint {folder} cannot be read ({' '.join(str(error).split())}); remove it"
        ) from error
    return read_safetensors(folder / "trained.safetensors")[0], state


def unset_then(settings: type, was: dict[str, Any]) -> dict[str, Any]:
    """What an older version did where it had no setting for it: mostly what the default still says."""
    then = {f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in fields(settings)}
    then |= {"flip": False}  # whatever the method's default is now
    if was.get("train_text_encoder"):  # all of it, at the UNet's rate
        then |= {"text_encoder_learning_rate": was["learning_rate"], "text_encoder_form": "whole"}
    return then


def begins_anew(out: Path | None) -> bool:
    """Whether a run that is to go on has to begin anew: it was ended before its first checkpoint.

    Raises ValueError where there is nothing to resume: no folder, or one whose run is finished.
    """
    if out is None:
        raise ValueError("there is nothing to resume: no out folder was given")
    if run_checkpoints(out):
        return False
    concept, begun = out / "concept.safetensors", out / BEGUN
    if concept.exists() and not (begun.is_file() and begun.stat().st_mtime_ns > concept.stat().st_mtime_ns):
        raise ValueError(
            f"there is nothing to resume: {out} has a concept and no whole checkpoint; give another out folder, or "
            "train it anew (--overwrite)"
        )
    return True


def begun_with(out: Path | None) -> dict[str, Any]:
    """What the last checkpoint of a run, or else its beginning, says that it began with.

    {} where there is neither, or none that can be read.
    """
    found = run_checkpoints(out) if out is not None else []
    file = found[-1] / "state.json" if found else (out or Path()) / BEGUN
    try:
        state = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError):
        return {}  # `read_checkpoint` says what is wrong with it
    whole = isinstance(state, dict) and state.keys() >= IDENTITY and isinstance(state["settings"], dict)
    return state if whole else {}


def check_same_run(
    folder: Path, was: dict[str, Any], now: dict[str, Any], settings: type, older_data: str = ""
) -> None:
    """Refuse to go on with other settings, pictures or another base model, and say what differs.

    Args:
        folder: the checkpoint, for the sentence.
        was: the checkpoint's identity; one of version 0.1.0 also holds the settings of every other method.
        now: the run's.
        settings: the method's settings class.
        older_data: the digest of the run's data as an older version wrote it.
    """
    names = f"({was['base_name']}, now {now['base_name']})"
    if was["base"].partition(":")[0] != now["base"].partition(":")[0]:
        raise ValueError(f"{folder} was made on another base model {names}")
    if ":" in was["base"] and not same_base(was["base"], now["base"]):
        fix = "give the run's own, or another out folder"
        raise ValueError(f"{folder} was made on a base model of this kind with other weights {names}; {fix}")
    if was["data"] not in (now["data"], older_data):
        raise ValueError(f"{folder} was made from other pictures; give the same ones, or another out folder")
    new = now["settings"]
    old = unset_then(settings, was["settings"]) | with_none_for_unset(settings, was["settings"])
    constant = new["lr_schedule"] == "constant"
    differing = [
        f"{name} was {old.get(name)!r} and is {value!r}"
        for name, value in new.items()
        if old.get(name) != (list(value) if isinstance(value, tuple) else value)
        and not (name in FREE and (name != "steps" or constant))
        and (name not in ONLY_WITH or new[ONLY_WITH[name]] or old[ONLY_WITH[name]])
    ]
    if differing:
        fix = "Fix: give the run's own, or another out folder"
        raise ValueError(f"{folder} was made with other settings: {'; '.join(differing)}. {fix}")
