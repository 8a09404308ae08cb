"""A run's folder and its checkpoints, each there whole or not at all. Without torch: commands look before that."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

BEGUN = "begun.json"  # what the last run in the folder began with
FILES = ("trained.safetensors", "optimizer.pt", "state.json")  # of a whole checkpoint
LEFT = re.compile(r"\.(?:checkpoint-\d+|concept\.safetensors)\.(\d+)\.(?:part|old)")


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"checkpoint-{step}"


def step_of(folder: Path) -> int | None:
    """The step that a folder's name says; None where it names none."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else None


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints in a folder, of whichever run, by their steps."""
    found = [(step, f) for f in out.glob("checkpoint-*") if (step := step_of(f)) is not None and _whole(f)]
    return [folder for _, folder in sorted(found)]


def run_checkpoints(out: Path) -> list[Path]:
    """Those of the last run that began in a folder, which is the one that goes on."""
    last = run_in(out / BEGUN)
    return [folder for folder in checkpoints(out) if not last or is_of(folder, last)]


def is_of(folder: Path, run: str) -> bool:
    """Whether a checkpoint is of this run; one that cannot be read may be, and whoever reads it says so."""
    return run_in(folder / "state.json") in (run, None)


def run_in(file: Path) -> str | None:
    """The run that a checkpoint or a beginning says it is of.

    "" where it does not, as in older versions' files; None where it cannot be read.
    """
    try:
        state = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return str(state.get("run") or "") if isinstance(state, dict) else None


def remove_folder(folder: Path) -> None:
    """Remove a folder so that one that is half removed has no checkpoint's name; what stays, `sweep` removes."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    with suppress(OSError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def sweep(out: Path) -> None:
    """Remove what runs that were killed in the middle of a file or a checkpoint have left in their folder."""
    for left in out.glob(".*"):
        name = LEFT.fullmatch(left.name)
        if name is None or _runs(int(name[1])):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):
                left.unlink()
    for folder in out.glob("checkpoint-*"):
        if step_of(folder) is not None and _half(folder):
            remove_folder(folder)


def _whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _half(folder: Path) -> bool:
    """Whether a part of the files is there and nothing else: other trainers' checkpoints have that name too.

    An optimizer.pt alone may be one of theirs.
    """
    found = {f.name for f in folder.iterdir()} if folder.is_dir() else set()
    return not _whole(folder) and found <= {*FILES} and bool(found - {"optimizer.pt"})


def is_others(folder: Path) -> bool:
    """Whether something of this name is there that is not a checkpoint of ours, whole or half."""
    return folder.exists() and not (folder.is_dir() and (_whole(folder) or _half(folder)))


def _runs(process: int) -> bool:
    """Whether another process of this number may still be writing."""
    if process == os.getpid():
        return False
    if os.name == "nt":  # there a signal of 0 ends the process
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        pass
    return True
