"""Files that are there whole or not at all: written beside their place, then moved into it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def written(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file, and put it at `path` when it is whole; what fails leaves nothing behind."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    return path


def written_text(path: Path, text: str) -> Path:
    return written(path, lambda part: part.write_text(text, encoding="utf-8"))
