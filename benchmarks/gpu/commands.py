"""What a person types, on the embedded model: train, resume, sample with and without LAG, export, a short demo.

The commands run in this process, one after another, so that each shows torch's peak; each row begins with what an
earlier one has left, and fails with the command's own sentence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu import ROOT
from benchmarks.gpu.row import Absent, Machine, Row, peak_bytes
from pcs_trainer.cli.entry import main as pcs
from pcs_trainer.methods import TITLES

PHOTOS = str(ROOT / "examples" / "photos")
METHODS = tuple(TITLES)
NOT_MEASURED: dict[str, str] = {}
Words = Callable[[Machine], list[str]]


def ran(words: list[str]) -> dict[str, Any]:
    """Run one command with its output in the log; RuntimeError has its last line."""
    if importlib.util.find_spec("diffusers") is None:
        raise Absent("diffusers is not installed, and the embedded model needs it")
    out, begin = io.StringIO(), time.perf_counter()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = pcs([*words, "--debug"])
    finally:
        print(f"$ pcs {' '.join(words)}\n{out.getvalue()}", file=sys.stderr)
    took = time.perf_counter() - begin
    if code:
        raise RuntimeError(f"pcs {words[0]} ended with {code}: {' '.join(out.getvalue().split())[-300:]}")
    peak = peak_bytes()
    held = "" if peak is None else f", peak {peak / 1e9:.3f} GB"
    return {"seconds": took, "peak_bytes": peak, "said": f"{took:.1f} s{held}"}


def train(method: str, name: str, machine: Machine, *more: str, resume: bool = False) -> list[str]:
    """The words of a short training; one that is not resumed begins in a new folder."""
    folder = machine.work / "concepts" / name
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    steps = (2, 3) if machine.smoke else (20, 30)
    words = ["train", PHOTOS, "--class", "mug", "--method", method, "--out", str(folder), "--no-report"]
    words += ["--device", machine.device, "--steps", str(steps[resume])]
    few = ["--set", "prior_images=2", "--set", "prior_steps=2"] if "prior" in more else []
    return [*words, *few, *(word for word in more if word != "prior"), *(["--resume"] if resume else [])]


def sample(name: str, machine: Machine, *more: str) -> list[str]:
    out = machine.work / "pictures" / "-".join([name, *(word.strip("-") for word in more if word.startswith("--"))])
    shutil.rmtree(out, ignore_errors=True)
    words = ["sample", "a photo of {} on the beach", "--concept", str(machine.work / "concepts" / name)]
    return [*words, "--device", machine.device, "--steps", "2" if machine.smoke else "25", "--out", str(out), *more]


def export(name: str, form: str, machine: Machine) -> list[str]:
    out = machine.work / "exports" / f"{name}-{form}"
    shutil.rmtree(out, ignore_errors=True)
    return ["export", str(machine.work / "concepts" / name), "--format", form, "--out", str(out)]


def demo(machine: Machine) -> list[str]:
    out = machine.work / "demo"
    shutil.rmtree(out, ignore_errors=True)
    return ["demo", "--effort", "0.02", "--out", str(out)]


def prior_of(method: str) -> tuple[str, ...]:
    """Few class images where a method draws a hundred."""
    from pcs_trainer.methods import method_named

    return ("prior",) if getattr(method_named(method).settings(), "prior_weight", 0) else ()


def calls() -> dict[str, Words]:
    """{row: the words}: the first method through everything, DreamBooth with its step in the backward, the rest."""
    first, later = "personalized_residuals", [name for name in METHODS if name != "personalized_residuals"]
    no_proof = ("--set", "check_backend=false")
    found: dict[str, Words] = {
        "train, with the proof": lambda m: train(first, first, m),
        "resume": lambda m: train(first, first, m, resume=True),
        "sample": lambda m: sample(first, m),
        "sample with LAG": lambda m: sample(first, m, "--lag"),
        "export diffusers": lambda m: export(first, "diffusers", m),
        "export kohya": lambda m: export(first, "kohya", m),
        "export pipeline": lambda m: export(first, "pipeline", m),
        "train, without the proof": lambda m: train(first, "unproven", m, *no_proof),
    }
    for method in later:
        found[f"train {method}"] = functools.partial(_learn, method)
    found["resume dreambooth"] = lambda m: train("dreambooth", "dreambooth", m, "prior", resume=True)
    found["dreambooth without the proof"] = lambda m: train("dreambooth", "unproven", m, "prior", *no_proof)
    found["dreambooth, step after the backward"] = lambda m: train(
        "dreambooth", "after", m, "prior", "--set", "step_in_backward=false"
    )
    for dtype in ("float16", "float32"):
        found[f"train in {dtype}"] = functools.partial(_in_dtype, dtype)
    found["demo"] = demo
    return found


def _learn(method: str, machine: Machine) -> list[str]:
    return train(method, method, machine, *prior_of(method))


def _in_dtype(dtype: str, machine: Machine) -> list[str]:
    return train("personalized_residuals", dtype, machine, "--dtype", dtype)


SMOKE = ("train, with the proof", "sample with LAG", "export kohya")


def rows(smoke: bool) -> list[Row]:
    """Every command; on the CPU a few of them."""
    chosen = {name: words for name, words in calls().items() if not smoke or name in SMOKE}
    return [Row(name, functools.partial(_row, words)) for name, words in chosen.items()]


def _row(words: Words, machine: Machine) -> dict[str, Any]:
    return ran(words(machine))
