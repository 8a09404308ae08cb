"""Failures on purpose, for a run with --smoke: what a GPU's first day may bring.

SECTION[:ROW][=KIND]   in a section's row (counted from 1; without a number in every row), of a kind in KINDS
no-PACKAGE             the package cannot be imported, as where it is not installed
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

LOST: list[bool] = []  # the context is lost in the row that runs


def _error() -> None:
    raise RuntimeError("injected: the row raises")


def _memory() -> None:
    import torch

    raise torch.cuda.OutOfMemoryError("injected: out of memory")


def _time() -> None:
    time.sleep(3600)


def _hang() -> None:
    """A call that no signal ends, as a kernel that never returns."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM})
    time.sleep(3600)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _lose() -> None:
    LOST.append(True)
    raise RuntimeError("injected: an illegal memory access")


KINDS: dict[str, Callable[[], None]] = {
    "error": _error,
    "memory": _memory,
    "time": _time,
    "hang": _hang,
    "die": _die,
    "lost": _lose,
}


def parsed(text: str, sections: Sequence[str]) -> list[tuple[str, int, str]]:
    """(section, row or 0, kind), with no-PACKAGE as ("", 0, PACKAGE); ValueError names what it does not know."""
    found = []
    for word in filter(None, text.split(",")):
        if word.startswith("no-"):
            found.append(("", 0, word[3:]))
            continue
        place, _, kind = word.partition("=")
        section, _, number = place.partition(":")
        if section not in sections or not (number.isdigit() or number == "") or (kind or "error") not in KINDS:
            raise ValueError(
                f"--inject: expected SECTION[:ROW][=KIND] or no-PACKAGE, got {word!r}; sections: "
                f"{', '.join(sections)}; kinds: {', '.join(KINDS)}"
            )
        found.append((section, int(number or 0), kind or "error"))
    return found


def hide_packages(injected: Sequence[tuple[str, int, str]]) -> None:
    """Make their imports fail as they do where they are not installed."""
    for section, _, package in injected:
        if not section:
            sys.modules[package] = None  # type: ignore[assignment]


def failure(injected: Sequence[tuple[str, int, str]], section: str, number: int) -> Callable[[], None]:
    """What to run before a section's row `number`, from 1."""
    kinds = [kind for name, row, kind in injected if name == section and row in (0, number)]
    return KINDS[kinds[0]] if kinds else lambda: None
