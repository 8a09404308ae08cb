"""The numbers of each step: smoothed loss, speed, time left; and the run's CSV log."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..files import written_text
from ..settings import Settings
from .events import peak_memory

COLUMNS = ("step", "loss", "smoothed", "subject", "prior", "preservation", "lr", "its_per_second")
PROBES = "probe.csv"
SMOOTHING = 0.95  # of the loss that is shown: about the last twenty steps, as single ones tell nothing at batch 1


class Log:
    """out/logs/loss.csv, one line a step; a resumed run goes on in it, and a full disk ends it with a warning."""

    def __init__(self, out: Path | None, settings: Settings, step: int, warn: Callable[[str], None]) -> None:
        self.out, self.s, self.warn = out, settings, warn
        self.smoothed: float | None = None
        self.first, self.started = step, time.monotonic()
        self._file: IO[str] | None = None
        self._probes: list[str] = []

    def __enter__(self) -> Log:
        if self.out is not None:
            path = self.out / "logs" / "loss.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text().splitlines()[1:] if self.first and path.is_file() else []
            kept = [line for line in lines if int(line.split(",")[0]) <= self.first]  # skipped steps have no line
            self._file = path.open("w", newline="")
            self._file.write("\n".join([",".join(COLUMNS), *kept]) + "\n")
            probes = path.with_name(PROBES)
            earlier = probes.read_text().splitlines()[1:] if self.first and probes.is_file() else []
            if not self.first:
                probes.unlink(missing_ok=True)
            self._probes = [line for line in earlier if int(line.split(",")[0]) <= self.first]
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # what could not be written has been told
                self._file.close()

    def _lost(self, error: OSError) -> None:
        """The log ends where the disk is full; the training does not."""
        self.warn(f"the log in {self.out} could not be written ({error.strerror or error}); training goes on without")
        self.out = None

    def probe(self, step: int, held_out: float, drift: float) -> None:
        """out/logs/probe.csv: what the probe saw so far."""
        if self.out is not None:
            self._probes.append(f"{step},{held_out:.6g},{drift:.6g}")
            try:
                written_text(self.out / "logs" / PROBES, "\n".join(["step,held_out,drift", *self._probes]) + "\n")
            except OSError as error:
                self._lost(error)

    def step(self, step: int, parts: list[dict[str, float]], rate: float) -> dict[str, Any]:
        """The data of a step's event."""
        mean = {k: sum(p[k] for p in parts) / len(parts) for k in parts[0]}
        self.smoothed = (
            mean["loss"] if self.smoothed is None else SMOOTHING * self.smoothed + (1 - SMOOTHING) * mean["loss"]
        )
        speed = (step - self.first) / max(time.monotonic() - self.started, 1e-9)
        data = {
            "loss": mean["loss"],
            "smoothed": self.smoothed,
            "subject": mean["subject"],
            "prior": mean.get("prior"),
            "preservation": mean.get("preservation"),
            "lr": rate,
            "its_per_second": speed,
            "seconds_left": (self.s.steps - step) / speed,
            "peak_memory": peak_memory(),
        }
        if self._file is not None and self.out is not None:
            row = [step, *(data[c] for c in COLUMNS[1:])]
            try:
                csv.writer(self._file).writerow(["" if v is None else f"{v:.6g}" for v in row])
                self._file.flush()
            except OSError as error:
                self._lost(error)
        return data
