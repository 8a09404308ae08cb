"""Does a run on the CPU stay within its budget? Resident memory of every phase, beside what was planned.

    python -m benchmarks.real.budgets --methods dreambooth --budgets 4GB 6GB 8GB

`pcs train --budget` on SD1.5's true shapes with random weights, a process each. A refused run is a row too: with the
phase that does not fit. Rows go to benchmarks/results/budgets.csv; nothing is timed.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from pcs_trainer.memory.whole_run import plan_run
from pcs_trainer.methods import TITLES

from benchmarks.real.checkpoint import make_checkpoint
from benchmarks.real.commands import PHOTOS, few_class_images
from benchmarks.real.meter import ROOT, measured
from benchmarks.real.results import add_rows

RESULTS = ROOT / "benchmarks" / "results" / "budgets.csv"
PREVIEW = "a {} here"


def rows(model: Path, method: str, budget: str, size: int, steps: int, work: Path) -> list[dict[str, object]]:
    """A run within a budget: a row a phase."""
    few = few_class_images(method)
    settings = {"steps": steps, "preview_every": 2, "preview_prompts": (PREVIEW,), **few}
    found = plan_run(model, method, size, None, budget, torch.bfloat16, "cpu", report=False, **settings)
    about: dict[str, object] = {"model": "SD1.5", "method": method, "resolution": size, "budget": budget}
    if not found.fits:
        return [about | {"phase": found.largest.name, "planned_gb": gb(found.largest.bytes), "outcome": found.missing}]
    words = ["train", str(PHOTOS), "--class", "mug", "--model", str(model), "--method", method]
    words += ["--resolution", str(size), "--budget", budget, "--device", "cpu", "--dtype", "bfloat16"]
    words += ["--steps", str(steps), "--out", str(work / "run"), "--quiet", "--no-report"]
    words += ["--preview", PREVIEW, "--preview-every", "2"]
    words += [word for name, value in few.items() for word in ("--set", f"{name}={value}")]
    run = measured(words, work / "log.txt", work)
    about |= {"packing": found.packing, "plans": found.step.plans, "exit": run.code}
    made: list[dict[str, object]] = []
    for phase in found.phases:
        size_found = run.phases.get(phase.name, (0, 0.0))[0]
        off = f"{size_found / phase.bytes - 1:+.1%}" if size_found else ""
        row = {"phase": phase.name, "planned_gb": gb(phase.bytes), "resident_gb": gb(size_found), "off": off}
        made.append(about | row | {"outcome": "within" if size_found <= found.budget else "over"})
    return made


def gb(size: float) -> str:
    return f"{size / 1e9:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--budgets", nargs="*", default=["4GB", "6GB", "8GB"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "real")
    parser.add_argument("--merges", type=Path, help="CLIP's bpe_simple_vocab_16e6.txt.gz; fetched with pip if left out")
    given = parser.parse_args()
    model = make_checkpoint(given.folder / "sd15", given.merges)
    for method in given.methods:
        for budget in given.budgets:
            work = given.folder / "budgets" / f"{method}-{budget}"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            found = rows(model, method, budget, given.size, given.steps, work)
            add_rows(RESULTS, found)
            for row in found:
                print(*(str(row.get(name, "")) for name in SHOWN), sep="  ", flush=True)
            shutil.rmtree(work / "cache", ignore_errors=True)


SHOWN = ("method", "budget", "packing", "phase", "planned_gb", "resident_gb", "off", "outcome")

if __name__ == "__main__":
    main()
