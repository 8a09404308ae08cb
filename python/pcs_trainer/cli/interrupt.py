"""Ctrl-C on the command line: once stops at the next safe place, twice leaves at once; a training takes SIGTERM too."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from .exit_codes import INTERRUPTED

if TYPE_CHECKING:
    from ..training.stop import Stop


class Stopped(Exception):
    """Ctrl-C was pressed: raised between two steps to end what is running."""


def stop_on_ctrl_c(doing: str, *also: signal.Signals) -> Stop:
    """A Stop to enter around a command's work.

    Args:
        doing: what happens after the first Ctrl-C.
        also: further signals that mean the same.
    """
    from ..training.stop import Stop  # the room loads torch, which `pcs --help` must not

    message = f"pcs: {doing}; press again to leave at once"
    return Stop(signals=(signal.SIGINT, *also), take_over=True, message=message, leave=leave_at_once)


def leave_at_once() -> NoReturn:
    """End the process here: no `finally` runs, so nothing is left waiting for a kernel or a thread to finish."""
    os.write(2, b"\npcs: left at once; nothing more was saved\n")
    sys.stdout.flush()
    os._exit(INTERRUPTED)
