"""NVIDIA's own tools on a few kernels: accesses out of bounds, and the counters that modelled times are read beside."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT
from benchmarks.gpu.row import Absent, Machine, Row

CHECKED = "bf16 and (7 or conv) and not repeats"  # a few cases of every op, those with odd sizes
PROFILED = ("adamw8bit", "lowrank_residual")


def _run(command: list[str], machine: Machine, name: str) -> str:
    """The tool's output, kept whole in the log; RuntimeError where it fails, Absent where it is not installed."""
    if shutil.which(command[0]) is None:
        raise Absent(f"{command[0]} is not on the PATH")
    log = machine.out / "tools.txt"
    with log.open("a") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        begins = out.tell()
        code = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, timeout=max(1, machine.left())
        ).returncode
    printed = _read(log, begins)
    if code:
        last = (printed.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"{name} ended with {code}: {last}")
    return printed


def _read(log: Path, begins: int) -> str:
    with log.open(errors="replace") as text:
        text.seek(begins)
        return text.read()


def sanitizer(machine: Machine) -> dict[str, Any]:
    """memcheck over the kernel tests of odd sizes."""
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    command += ["-q", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k", CHECKED]
    printed = _run(command, machine, "compute-sanitizer")
    return {"said": next((line for line in printed.splitlines() if "ERROR SUMMARY" in line), "no summary").strip("= ")}


def counters(op: str, machine: Machine) -> dict[str, Any]:
    """Nsight Compute's basic set of an op's launches."""
    command = ["ncu", "--set", "basic", "--clock-control", "none", "-k", "regex:_kernel", "-c", "6"]
    printed = _run([*command, sys.executable, "-m", "benchmarks.gpu.kernels", op], machine, "ncu")
    wanted = ("Duration", "Throughput", "Registers", "Occupancy")
    lines = [" ".join(line.split()) for line in printed.splitlines() if any(word in line for word in wanted)]
    return {"lines": lines, "said": f"{len(lines)} figures, whole in tools.txt"}


def rows(smoke: bool) -> list[Row]:
    found = [Row("compute-sanitizer memcheck", sanitizer)]
    return [*found, *(Row(f"ncu {op}", functools.partial(counters, op)) for op in PROFILED)]
