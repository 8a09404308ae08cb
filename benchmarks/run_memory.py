"""Resident memory of each phase of a real run on the CPU, beside what `plan_run` said of it.

    python benchmarks/run_memory.py --model FOLDER --budget 4GB --resolution 256

Each run is a process of its own, from which the kernel's high-water mark is read and reset at the phases' borders
(Linux). Weights may be random: values change no size. Rows go to benchmarks/results/run_memory.csv; nothing is timed.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing

RESULTS = timing.RESULTS / "run_memory.csv"
COLUMNS = (
    "date",
    "torch",
    "commit",
    "model",
    "method",
    "resolution",
    "budget",
    "packing",
    "phase",
    "planned_gb",
    "resident_gb",
    "off",
)
PHOTO_SIDE = 96  # pixels: photos are enlarged to the resolution in any case


class Meter:
    """The resident peak of the phase that runs, innermost first."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.stack = ["loading"]

    def turn(self, change: Callable[[], object]) -> None:
        """Book the peak since the last turn, and begin anew."""
        status = Path("/proc/self/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+)", status)
        assert found is not None
        name = self.stack[-1]
        self.peaks[name] = max(self.peaks.get(name, 0), 1024 * int(found[1]))
        change()
        Path("/proc/self/clear_refs").write_text("5")

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Book what `owner.name` does under a phase."""
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            self.turn(lambda: self.stack.append(phase))
            try:
                return inner(*args, **kwargs)
            finally:
                self.turn(self.stack.pop)

        setattr(owner, name, outer)


def watched(meter: Meter) -> None:
    """Put the meter on the places where phases begin."""
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


def one_run(options: argparse.Namespace) -> None:
    """A run within the budget, in this process; prints a line a phase."""
    import os

    import numpy as np
    import torch
    from PIL import Image

    os.environ["PCS_CACHE"] = options.work
    from pcs_trainer.cli.entry import main
    from pcs_trainer.memory.whole_run import plan_run

    meter = Meter()
    photos = Path(options.work) / "photos"
    photos.mkdir(parents=True)
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 255, (PHOTO_SIDE, PHOTO_SIDE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / f"{i}.png")
    # prior_images and prior_steps as small as they go: their number changes no peak of memory but the pictures' own
    settings: dict[str, Any] = {"steps": options.steps, "preview_every": 2, "preview_prompts": ("a {} here",)}
    if options.method in ("dreambooth", "custom_diffusion"):
        settings |= {"prior_images": 2, "prior_steps": 2}
    found = plan_run(
        options.model,
        options.method,
        options.resolution,
        None,
        options.budget,
        torch.bfloat16,
        "cpu",
        report=options.report,
        **settings,
    )
    print(f"plan {found.packing}", *(f"{p.name}={p.bytes}" for p in found.phases), sep="\t")
    if not found.fits:
        print(f"refused\t{found.missing}")
        return
    watched(meter)
    words = ["train", str(photos), "--class", "mug", "--model", options.model, "--method", options.method]
    words += ["--resolution", str(options.resolution), "--budget", options.budget, "--device", "cpu"]
    words += ["--dtype", "bfloat16", "--steps", str(options.steps), "--out", f"{options.work}/out", "--quiet"]
    words += ["--preview", "a {} here", "--preview-every", "2", *([] if options.report else ["--no-report"])]
    if "prior_images" in settings:
        words += ["--prior-images", "2", "--set", "prior_steps=2"]
    code = main(words)
    meter.turn(lambda: None)
    print(f"code {code}", *(f"{name}={peak}" for name, peak in meter.peaks.items()), sep="\t")


def figures(line: str) -> dict[str, int]:
    """phase=bytes, tab by tab."""
    return {name: int(size) for name, _, size in (part.partition("=") for part in line.split("\t")[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a diffusers folder")
    parser.add_argument("--method", default="personalized_residuals")
    parser.add_argument("--budget", default="6GB")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="with the report, which takes the longest")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV file to append to")
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        one_run(options)
        return
    with tempfile.TemporaryDirectory() as work:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--work", work], stdout=subprocess.PIPE, text=True, check=False
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("plan ", "code ", "refused"))]
    if done.returncode or not lines or lines[-1].startswith("refused"):
        sys.exit(f"no run: {lines[-1] if lines else done.returncode}")
    planned, resident = figures(lines[0]), figures(lines[-1])
    facts = {k: v for k, v in timing.circumstances().items() if k in ("date", "torch", "commit")}
    facts |= {"model": Path(options.model).name, "method": options.method, "resolution": options.resolution}
    facts |= {"budget": options.budget, "packing": lines[0].split("\t")[0].removeprefix("plan ")}
    new = not options.out.exists()
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for phase, bytes_planned in planned.items():
            measured = resident.get(phase, 0)
            off = f"{measured / bytes_planned - 1:+.1%}" if measured else ""
            row = {"phase": phase, "planned_gb": f"{bytes_planned / 1e9:.3f}", "resident_gb": f"{measured / 1e9:.3f}"}
            writer.writerow(facts | row | {"off": off})
            print(f"{phase:<20}{bytes_planned / 1e9:8.3f}{measured / 1e9:8.3f}  {off}")
    print(f"most: planned {max(planned.values()) / 1e9:.3f}, resident {max(resident.values()) / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
