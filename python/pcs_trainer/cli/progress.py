"""Progress on the screen: one live panel on a terminal (with rich), plain lines anywhere else.

with Progress("personalized_residuals") as progress:
    trainer.train(on_event=progress)
"""

from __future__ import annotations

import logging
import os
import sys
import time
from importlib.util import find_spec
from types import TracebackType
from typing import Any, TextIO

from ..units import bytes_text, time_text

EVERY = 2.0  # seconds between plain lines: a log of an hour stays below 2000 lines


def parts_of(data: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of a step, named and in words: losses, speed, time left, memory; what is not known is left out."""
    found: list[tuple[str, str]] = []
    names = ("loss", "smoothed", "subject", "prior") if data.get("prior") is not None else ("loss", "smoothed")
    found += [(name, f"{data[name]:.4f}") for name in names if data.get(name) is not None]
    if data.get("its_per_second"):
        rate = data["its_per_second"]
        found.append(("", f"{rate:.2f} it/s" if rate >= 0.1 else f"{1 / rate:.1f} s/it"))
    if data.get("seconds_left") is not None:
        found.append(("left", time_text(data["seconds_left"])))
    if data.get("peak_memory"):
        found.append(("peak", bytes_text(data["peak_memory"])))
    return found


def line_of(label: str, step: int, total: int, data: dict[str, Any]) -> str:
    """A step as one line of plain text."""
    figures = "  ".join(f"{name} {value}".strip() for name, value in parts_of(data))
    return f"{label} {step}/{total}  {figures}".rstrip()


class Progress:
    """Takes a Trainer's events, and counts of other work by `count`; never raises for what it cannot show."""

    def __init__(self, label: str = "", stream: TextIO | None = None, quiet: bool = False, warns: bool = True) -> None:
        self.label = label
        self.stream = stream or sys.stderr
        self.quiet, self.warns = quiet, warns  # a quiet one still warns: nothing else tells of a lost checkpoint
        self.losses: list[dict[str, float]] = []
        self._shown_at = -EVERY
        self._live: Any = None
        self._shown_label = ""

    def __enter__(self) -> Progress:
        if self.stream.isatty() and not self.quiet and find_spec("rich"):
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self.stream), refresh_per_second=8, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, event: Any) -> None:
        """One event of a Trainer."""
        if event.kind == "step":
            self.losses.append(
                {"step": event.step} | {k: v for k, v in event.data.items() if isinstance(v, (int, float))}
            )
            self.count(event.step, event.total, **event.data)
        elif event.kind == "progress":
            self.count(**event.data)
        elif event.kind == "warning" and self.quiet and self.warns:
            print(event, file=self.stream, flush=True)
        else:
            self.say(str(event))

    def count(self, done: int, total: int, label: str = "", **data: Any) -> None:
        """`done` of `total` of something; the last one is always shown."""
        if self.quiet:
            return
        label = label or self.label
        if self._live is not None:
            self._live.update(_panel(label, done, total, data))
            return
        now = time.monotonic()
        if done >= total or now - self._shown_at >= EVERY or label != self._shown_label:
            self._shown_at = now
            print(line_of(label, done, total, data), file=self.stream, flush=True)
        self._shown_label = label

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)


def _panel(label: str, done: int, total: int, data: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    figures = Text()
    for name, value in parts_of(data):
        figures.append(f"{name} " if name else "", "dim").append(f"{value}  ", "bold" if name == "smoothed" else "")
    top = Table.grid(padding=(0, 1))
    top.add_row(
        Text(label, "bold"), ProgressBar(total=max(1, total), completed=done, width=32), Text(f"{done}/{total}")
    )
    return Group(top, figures)


def quiet_libraries() -> None:
    """The libraries' own chatter stays off the screen; the hub's download bars remain."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    enable_progress_bars()
