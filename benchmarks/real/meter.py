"""A `pcs` command in a process of its own, with the resident memory and the time of each of its phases.

    python -m benchmarks.real.meter OUT.json train photos ...

The kernel's high-water mark is read and reset where one phase ends and the next begins (Linux alone). The file holds
{"code": exit code, "phases": {name: [largest resident bytes, seconds]}}.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LOADING, OTHERS = "loading", "between phases"  # what runs in no named phase before the first one, and after it


class Meter:
    """Books memory and time to the phase that runs, the innermost where one is inside another."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.stack = [LOADING]
        self.since = time.monotonic()

    def turn(self, change: Callable[[], object]) -> None:
        """Book what was since the last turn, and begin anew."""
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        name, now = self.stack[-1], time.monotonic()
        self.peaks[name] = max(self.peaks.get(name, 0), 1024 * int(found[1]))
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        change()
        self.since = now
        Path("/proc/self/clear_refs").write_text("5")

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Book what `owner.name` does to a phase."""
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            self.turn(lambda: self.stack.append(phase))
            self.stack[0] = OTHERS
            try:
                return inner(*args, **kwargs)
            finally:
                self.turn(self.stack.pop)

        setattr(owner, name, outer)


def watch_training(meter: Meter) -> None:
    """Put the meter where the phases that `pcs plan` names begin."""
    from pcs_trainer.data import batches
    from pcs_trainer.report import run_report
    from pcs_trainer.training import objective, probe, run, trainer

    for owner, name, phase in (
        (batches, "cached_moments", "photos to latents"),
        (batches, "prior_pictures", "class images"),
        (objective.Objective, "_frozen_texts", "text states"),
        (trainer.Trainer, "_check_gradients", "gradient check"),
        (run.Run, "one_step", "training step"),
        (probe.Probe, "__init__", "validation"),
        (probe.Probe, "measure", "validation"),
        (run.Run, "preview", "preview"),
        (run.Run, "checkpoint", "checkpoint"),
        (run.Run, "finish", "finish"),
        (run_report, "write_run_report", "report"),
    ):
        meter.watch(owner, name, phase)


@dataclass
class Measured:
    """What a command needed: {phase: (largest resident bytes, seconds)}."""

    code: int
    phases: dict[str, tuple[int, float]]

    @property
    def peak(self) -> int:
        return max((size for size, _ in self.phases.values()), default=0)

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.phases.values())


def measured(words: Sequence[str], log: Path, work: Path) -> Measured:
    """Run `pcs` with these words in a process of its own, its output added to a log; `work` holds its cache.

    RuntimeError where it wrote no figures: it was killed, as for memory.
    """
    import os

    figures = work / "figures.json"
    figures.unlink(missing_ok=True)
    call = [sys.executable, "-m", "benchmarks.real.meter", str(figures), *words]
    with log.open("a") as out:
        out.write(f"$ pcs {' '.join(words)}\n")
        out.flush()
        environment = os.environ | {"PCS_CACHE": str(work / "cache")}
        done = subprocess.run(call, stdout=out, stderr=out, cwd=ROOT, env=environment, check=False)
    if not figures.is_file():
        raise RuntimeError(f"pcs {words[0]} ended with {done.returncode} and no figures; see {log}")
    found = json.loads(figures.read_text())
    return Measured(found["code"], {name: (size, seconds) for name, (size, seconds) in found["phases"].items()})


def main() -> None:
    """Run the command that was given, and write what it needed."""
    from pcs_trainer.cli.entry import main as pcs

    out, words = Path(sys.argv[1]), sys.argv[2:]
    meter = Meter()
    if words[0] == "train":
        watch_training(meter)
    code = pcs(words)
    meter.turn(lambda: None)
    phases = {name: [peak, round(meter.seconds[name], 1)] for name, peak in meter.peaks.items()}
    out.write_text(json.dumps({"code": code, "phases": phases}))


if __name__ == "__main__":
    main()
