"""Every method from its preset to its exports on SD1.5's true shapes, by the commands that a person types.

    python -m benchmarks.real --steps 25 --size 256
    python -m benchmarks.real --kind sdxl --methods personalized_residuals --only train --steps 1 --budget 14GB

A checkpoint of random weights is made once (2.1 GB in out/real/sd15). For each method: `pcs train` with its preset,
`pcs train --resume`, `pcs sample`, and `pcs export` in each format. Every command must end with 0. Adds rows to
benchmarks/results/real.csv: seconds and the largest resident memory, for each phase of a training too, beside what
`plan_run`, which `pcs plan` prints, said of it. `--methods` takes some. SDXL's folder is 6.9 GB.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from pcs_trainer.memory.whole_run import plan_run
from pcs_trainer.methods import TITLES

from benchmarks.real.checkpoint import KINDS, make_checkpoint
from benchmarks.real.commands import commands, few_class_images
from benchmarks.real.meter import ROOT, Measured, measured
from benchmarks.real.results import add_rows

RESULTS = ROOT / "benchmarks" / "results" / "real.csv"


def planned(model: Path, method: str, steps: int, size: int, budget: str | None) -> dict[str, int]:
    """{phase: bytes} of the training, as `pcs plan` prints them."""
    settings = {"steps": steps, **few_class_images(method)}
    found = plan_run(model, method, size, None, budget, torch.bfloat16, "cpu", report=False, **settings)
    return {phase.name: phase.bytes for phase in found.phases}


def rows_of(command: str, run: Measured, plan: dict[str, int]) -> list[dict[str, object]]:
    """A row for the command, and one for each phase that was planned."""
    whole: dict[str, object] = {"command": command, "phase": "", "exit": run.code, "seconds": round(run.seconds, 1)}
    made = [whole | figures(run.peak, max(plan.values(), default=0))]
    for phase, expected in plan.items():
        peak, seconds = run.phases.get(phase, (0, 0.0))
        made.append({"command": command, "phase": phase, "seconds": seconds, **figures(peak, expected)})
    return made


def figures(peak: int, expected: int) -> dict[str, object]:
    """GB found and planned, and how far the first is from the second."""
    found = {"resident_gb": f"{peak / 1e9:.3f}", "planned_gb": f"{expected / 1e9:.3f}" if expected else ""}
    return found | {"off": f"{peak / expected - 1:+.1%}" if expected and peak else ""}


def main() -> int:
    """Run what was asked for; the number of commands that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--kind", default="sd15", choices=list(KINDS))
    parser.add_argument("--only", nargs="*", help="some of the commands, such as train")
    parser.add_argument("--budget", help="of the training, such as 14GB (default: none)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "real")
    parser.add_argument("--merges", type=Path, help="CLIP's bpe_simple_vocab_16e6.txt.gz; fetched with pip if left out")
    given = parser.parse_args()
    model = make_checkpoint(given.folder / given.kind, given.merges, given.kind)
    about = {"model": given.kind, "steps": given.steps, "resolution": given.size, "budget": given.budget or ""}
    failed = 0
    for method in given.methods:
        out = given.folder / f"{given.kind}-{method}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        plan = planned(model, method, given.steps, given.size, given.budget)
        for name, words in commands(method, model, out, given.steps, given.size):
            if given.only and name not in given.only:
                continue
            words += ["--budget", given.budget] if given.budget and words[0] == "train" else []
            run = measured(words, out / "log.txt", out)
            failed += run.code != 0
            made = rows_of(name, run, plan if name == "train" else {})
            add_rows(RESULTS, [{"method": method, **about, **row} for row in made])
            for row in made:
                print(f"{method:23}", *(f"{row.get(column, '')!s:>{w}}" for column, w in SHOWN.items()), flush=True)
    return failed


SHOWN = {"command": 17, "phase": 18, "exit": 3, "seconds": 8, "resident_gb": 8, "planned_gb": 8, "off": 8}

if __name__ == "__main__":
    sys.exit(main())
