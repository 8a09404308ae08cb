"""Stopping: a caller's question, Ctrl-C or a stop signal end a run after the running step; a second one at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Stop:
    """True once the run should end. While it is entered in the main thread, it answers SIGINT and SIGTERM."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.asked = asked
        self.seen = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.default_int_handler, signal.SIG_DFL):
                    continue  # the caller answers it, and asks through should_stop
                self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __bool__(self) -> bool:
        self.seen = self.seen or bool(self.asked())
        return self.seen
