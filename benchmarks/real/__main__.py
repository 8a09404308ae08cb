"""Every method from its preset to its exports on SD1.5's true shapes, by the commands that a person types.

    python -m benchmarks.real --steps 25 --size 256

A checkpoint of random weights is made once (2.1 GB in out/real/sd15). For each method: `pcs train` with its preset,
`pcs train --resume`, `pcs sample`, and `pcs export` in each format. Every command must end with 0. Adds rows to
benchmarks/results/real.csv: seconds, the largest resident memory, and what `pcs plan` said. About two hours on two
cores; `--methods` takes some.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

from pcs_trainer.methods import TITLES

from benchmarks.real.checkpoint import make_checkpoint

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "real.csv"
PHOTOS = ROOT / "examples" / "photos"


@dataclass
class Row:
    """One command on one method."""

    date: str
    machine: str
    method: str
    command: str
    code: int
    seconds: float
    peak_mb: int


def run(words: list[str], log: Path) -> tuple[int, float, int]:
    """(exit code, seconds, largest resident memory in MB) of a `pcs` command, its output in a log."""
    started = time.monotonic()
    with log.open("a") as out:
        out.write(f"$ pcs {' '.join(words)}\n")
        out.flush()
        child = subprocess.Popen([sys.executable, "-m", "pcs_trainer", *words], stdout=out, stderr=out, cwd=ROOT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, time.monotonic() - started, usage.ru_maxrss // 1024


def commands(method: str, model: Path, out: Path, steps: int, size: int) -> Iterator[tuple[str, list[str]]]:
    """What a person does with a method: (what the row says, the words after `pcs`)."""
    concept = str(out / "run")
    model_flags = ["--model", str(model)]
    learn = ["train", str(PHOTOS), "--class", "mug", "--method", method, *model_flags, "--out", concept]
    learn += ["--resolution", str(size), "--no-report", "--dtype", "bfloat16"]
    yield "train", [*learn, "--steps", str(steps), *_little_prior(method)]
    yield "resume", [*learn, "--steps", str(steps + 5), *_little_prior(method), "--resume"]
    drawing = ["--steps", "4", "--height", str(size), "--width", str(size), "--out", str(out / "picture.png")]
    yield "sample", ["sample", "a photo of {} on the beach", "--concept", concept, *model_flags, *drawing]
    for name in ("diffusers", "kohya", "pipeline"):
        target = str(out / f"export-{name}")
        yield f"export {name}", ["export", concept, "--format", name, *model_flags, "--out", target]
    files = sorted((out / "export-kohya").glob("*.safetensors"))
    if files:
        target = str(out / "imported")
        yield "import kohya", ["export", str(files[0]), "--format", "concept", *model_flags, "--out", target]


def _little_prior(method: str) -> list[str]:
    """Two class images of two steps where a preset draws a hundred: hours on a CPU, and the same code."""
    from dataclasses import fields as names

    from pcs_trainer.methods import method_named

    settings = method_named(method).settings
    weight = next(field.default for field in names(settings) if field.name == "prior_weight")
    return ["--prior-images", "2", "--set", "prior_steps=2"] if weight else []


def main() -> int:
    """Run what was asked for; the number of commands that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "real")
    parser.add_argument("--merges", type=Path, help="CLIP's bpe_simple_vocab_16e6.txt.gz; fetched with pip if left out")
    given = parser.parse_args()
    model = make_checkpoint(given.folder / "sd15", given.merges)
    failed = 0
    for method in given.methods:
        out = given.folder / method
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for name, words in commands(method, model, out, given.steps, given.size):
            code, seconds, peak = run(words, out / "log.txt")
            failed += code != 0
            row = Row(f"{datetime.now(timezone.utc):%Y-%m-%d}", machine(), method, name, code, round(seconds, 1), peak)
            write(row)
            print(f"{method:24} {name:18} exit {code}  {seconds:7.1f} s  {peak:6} MB", flush=True)
    return failed


def machine() -> str:
    """This machine, in a few words."""
    with open("/proc/cpuinfo") as info:
        names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"


def write(row: Row) -> None:
    """Add a row to the results."""
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow([field.name for field in fields(Row)])
        writer.writerow(astuple(row))


if __name__ == "__main__":
    sys.exit(main())
