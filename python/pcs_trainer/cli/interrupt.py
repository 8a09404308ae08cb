"""Ctrl-C: once asks for a stop at the next safe place, twice leaves at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130


class Interrupt:
    """`with Interrupt("...") as stop:`: `stop()` says whether Ctrl-C was pressed; a second press ends the process."""

    def __init__(self, message: str) -> None:
        self.message = message
        self.pressed = False
        self._before: Any = None

    def __call__(self) -> bool:
        return self.pressed

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            os.write(2, b"\npcs: left at once; nothing more was saved\n")
            sys.stdout.flush()
            os._exit(INTERRUPTED)
        self.pressed = True
        os.write(2, f"\npcs: {self.message}\n".encode())
