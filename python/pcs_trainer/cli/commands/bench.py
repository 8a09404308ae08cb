"""pcs bench: time training and sampling on this machine."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ...files import written_text
from ...methods import methods_with
from ..exit_codes import DONE
from ..options import Command, Option, grouped, integer, one_of
from ..progress import Progress
from . import COMMANDS
from .common import METHODS, MODEL_FLAGS, RESOLUTION, open_model
from .other_trainers import MODEL_TRANSLATE

if TYPE_CHECKING:
    from ...model.model import Model

OPTIONS = (
    *grouped(
        "what to time",
        Option(
            "--method",
            "a method to time; may be repeated",
            one_of("method", METHODS),
            metavar="NAME",
            many=True,
            otherwise="all methods",
        ),
        Option("--steps", "timed training steps per method", integer(2, "10", 10_000), 10, "N"),
        Option("--batch", "images per step", integer(1, "4"), metavar="N", otherwise="the method's"),
        RESOLUTION,
        Option("--ops", "time every op against PyTorch instead (needs a checkout of the repository)", None, False),
    ),
    *MODEL_FLAGS,
    Option("--out", "also write the timings to this JSON file", metavar="FILE", group="output"),
)

EXAMPLES = (
    ("pcs bench", "seconds per training step of every method, and seconds per image"),
    (
        "pcs bench --method personalized_residuals --steps 5 --out out/bench.json",
        "one method, timings in a file",
    ),
)


def run(options: argparse.Namespace) -> int:
    """Time what was asked for and print a table; the exit code."""
    if options.ops:
        return run_ops()
    model = open_model(options)
    rows: list[dict[str, Any]] = []
    with Progress("timing") as progress:
        for method in options.method or METHODS:
            progress.label = method
            rows.append(time_method(model, method, options, progress))
        rows.append(time_sampling(model, options.resolution))
    print(f"{'':<26}{'seconds':>10}{'spread':>10}  of what")
    for row in rows:
        print(f"{row['name']:<26}{row['seconds']:>10.4f}{row['spread']:>10.0%}  {row['what']}")
    if options.out:
        written_text(Path(options.out), json.dumps(rows, indent=1))
    return DONE


def run_ops() -> int:
    """The ops' benchmark of the repository, in a process of its own; its exit code."""
    script = Path(__file__).parents[4] / "benchmarks" / "run.py"
    if not script.is_file():
        raise UsageError("--ops needs a checkout of the repository, for its benchmarks; this is an installed package")
    return subprocess.run([sys.executable, str(script)], check=False).returncode


def time_method(model: Model, method: str, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Median seconds of a training step after two warmup steps; images of noise stand for photos."""
    import numpy as np

    from ...model.autoencoder import own_size
    from ...training.trainer import Trainer

    side = options.resolution or min(own_size(model))
    noise = np.random.default_rng(0).integers(0, 255, (4, side, side, 3), dtype=np.uint8)
    chosen = {"steps": options.steps + 2, "prior_images": 1, "check_backend": False}
    chosen |= {"bank": 8} if method in methods_with("bank") else {}
    chosen |= {key: value for key in ("batch", "resolution") if (value := getattr(options, key))}
    times: list[float] = []

    def on_event(event: Any) -> None:
        if event.kind == "step":
            times.append(time.perf_counter())
            progress(event)

    trainer = Trainer(model, method, list(noise), "mug", **chosen)
    trainer.train(on_event)
    steps = [b - a for a, b in pairwise(times[1:])]
    batch = trainer.settings.batch
    prior = " and as many class images" * bool(trainer.settings.prior_weight)
    what = f"a training step of {batch} image{'s' * (batch > 1)}{prior}"
    return {"name": method, "what": what} | summary(steps)


def time_sampling(model: Model, size: int | None) -> dict[str, Any]:
    """Median seconds per image of three batches of four."""
    from ...sampling.drawing import sample

    times = []
    for seed in range(3):
        started = time.perf_counter()
        sample(model, ["a photo of a mug"] * 4, steps=25, seed=seed, size=size)
        times.append((time.perf_counter() - started) / 4)
    return {"name": "sampling", "what": "an image of 25 steps, four at a time"} | summary(times)


def summary(times: list[float]) -> dict[str, float]:
    """The median, and how far the slowest and the fastest lie apart, as a share of it."""
    middle = statistics.median(times)
    return {"seconds": middle, "spread": (max(times) - min(times)) / middle}


COMMAND = Command(
    name="bench",
    about=COMMANDS["bench"],
    options=OPTIONS,
    examples=EXAMPLES,
    run=run,
    details="Run nothing else beside it. Spread is (slowest - fastest) / median.",
    translate=MODEL_TRANSLATE,
)
