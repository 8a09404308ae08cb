"""Stopping: a caller's question, Ctrl-C or a stop signal end a run after the running step; a second signal at once.

The trainer takes no signal by itself: a program that embeds it keeps its own. Who wants Ctrl-C to save says so:

    with Stop() as stop:
        trainer.train(should_stop=stop)
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, NoReturn


def interrupt() -> NoReturn:
    """What Python does at a Ctrl-C that nobody answers."""
    raise KeyboardInterrupt


class Stop:
    """Whether the run should end. While it is entered in the main thread, signals answer too.

    Args:
        asked: the caller's own question, asked whenever this one is.
        signals: the signals that mean "stop". One that the caller answers already is left to the caller.
        take_over: answer them in any case.
        message: written to stderr at the first signal.
        leave: called at the second signal.
    """

    def __init__(
        self,
        asked: Callable[[], bool] = lambda: False,
        *,
        signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM),
        take_over: bool = False,
        message: str = "",
        leave: Callable[[], object] = interrupt,
    ) -> None:
        self.asked = asked
        self.signals = signals
        self.take_over = take_over
        self.message = message
        self.leave = leave
        self.seen = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                unanswered = signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
                if unanswered or self.take_over:
                    self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def __call__(self) -> bool:
        self.seen = self.seen or bool(self.asked())
        return self.seen

    def _arrived(self, *_: object) -> None:
        if self.seen:
            self.leave()
        self.seen = True
        if self.message:
            os.write(
                2, f"\n{self.message}\n".encode()
            )  # print is not safe in a handler: it may be inside print already
