"""A row of a section: one measurement, which runs alone and whose failure is its own."""

from __future__ import annotations

import contextlib
import gc
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import timing
from benchmarks.gpu.book import ABSENT, DONE, FAILED, sentence

# Packages that a machine may lack: what needs them is then absent. Any other import error is a failure.
OPTIONAL = ("diffusers", "transformers", "bitsandbytes", "xformers", "torchao", "triton", "peft")


class Absent(Exception):
    """This machine lacks what the row measures, or measures with."""


class OutOfTime(BaseException):
    """The section's limit; no `except Exception` of what runs may take it."""


class Stopped(BaseException):
    """A signal that ends the run."""


@dataclass(frozen=True)
class Machine:
    """What a row runs on, and until when."""

    out: Path  # results alone: what is written here comes back from a lent machine
    work: Path  # concepts, pictures, compiled kernels
    smoke: bool  # on the CPU with small shapes: shows that the lines run and says nothing about speed
    ends: float  # time.monotonic() at which the section's limit is reached

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda"

    def left(self) -> float:
        """Seconds until the section's limit."""
        return self.ends - time.monotonic()


@dataclass(frozen=True)
class Row:
    """`run` gives the row's figures, among them `said`, a few words for the screen."""

    name: str
    run: Callable[[Machine], dict[str, Any]]


def _out_of_time(*_: object) -> NoReturn:
    raise OutOfTime


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """OutOfTime in the main thread after `seconds`; a call that holds the interpreter ends first."""
    before = signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(row: Row, machine: Machine, before: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The row's status, seconds and figures; where it has none, the reason in one sentence.

    Stopped is raised again with the failed row as its argument.
    """
    begin = time.monotonic()
    try:
        with _alarm(machine.left()):
            before()
            figures = row.run(machine)
            timing.finish()  # an error of a kernel arrives late, and belongs to the row that launched it
            found = {"status": DONE, **figures}
    except Absent as error:
        found = {"status": ABSENT, "said": str(error)}
    except OutOfTime:
        took = time.monotonic() - begin
        found = {"status": FAILED, "said": f"stopped after {took:.0f} s, when the section's time was over"}
    except (Stopped, KeyboardInterrupt) as error:
        raise Stopped({"status": FAILED, "said": sentence(error)}) from None
    except (Exception, SystemExit) as error:
        traceback.print_exc()  # to the log
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        lacks = (missing or "").partition(".")[0] in OPTIONAL
        said = f"{missing} is not installed" if lacks else sentence(error)
        found = {"status": ABSENT if lacks else FAILED, "said": said}
    return {**found, "seconds_in_all": round(time.monotonic() - begin, 1)}


def clean() -> None:
    """Let go of the row's tensors, also those in cycles (a hook and its parameter), and start the peak anew."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """The most that torch has held on the GPU since the row began."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None


def context_is_lost() -> bool:
    """Whether CUDA answers every further call with the error of an earlier one: only a new process helps."""
    try:
        timing.finish()
        if torch.cuda.is_initialized():
            torch.empty(1, device="cuda")
    except torch.cuda.OutOfMemoryError:
        return False
    except Exception:
        return True
    return False


def output_of(command: list[str], seconds: float = 60) -> str:
    """What a program prints; Absent where it is not installed, RuntimeError with its last line where it fails."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except FileNotFoundError:
        raise Absent(f"{command[0]} is not on the PATH") from None
    if ran.returncode:
        last = (ran.stderr.strip() or ran.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"{command[0]} ended with {ran.returncode}: {last}")
    return ran.stdout
