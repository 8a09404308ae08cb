"""The tests that need a GPU, a dtype at a time: bfloat16 first, which decides everything, wide float32 tiles last.

float32 tiles of width 160 compile for up to two minutes each, so a row of their own takes what time is left.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT
from benchmarks.gpu.row import Machine, OutOfTime, Row

KERNELS, TRAINER = "tests/test_gpu.py", "tests/test_gpu_trainer.py"
# name -> (file, -k); pytest's names of the kernel tests end with the dtype
CALLS = {
    "bf16": (KERNELS, "bf16"),
    "others": (KERNELS, "not bf16 and not fp16 and not fp32"),
    "trainer": (TRAINER, ""),
    "fp16": (KERNELS, "fp16"),
    "fp32": (KERNELS, "fp32 and not 160"),
    "fp32 of width 160": (KERNELS, "fp32 and 160"),
}
SHOWN = 40  # failures that a row names
STOP_BEFORE = 12.0  # seconds before the section's limit at which pytest is asked to end and write its report


def run_pytest(words: list[str], name: str, machine: Machine) -> dict[str, Any]:
    """Run pytest with its output in a file, and read what came of it; RuntimeError where a test failed."""
    report = machine.out / f"tests-{name.replace(' ', '-')}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--durations=20", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report.resolve()}", *_workers(), *words]
    log, environment = machine.out / "tests.txt", os.environ | {"PYTHONUNBUFFERED": "1"}  # a killed run keeps its lines
    with log.open("a") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        begins = out.tell()
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        code = _ended(child, machine.left() - STOP_BEFORE)
    with log.open() as text:
        text.seek(begins)
        printed = text.read()
    # the report of an interrupted run counts the tests that were running as passed
    found = figures(report if code is not None else None, printed)
    failed = [str(test) for test in found["failed"]]
    if code is None:
        raise RuntimeError(f"out of time: {found['said']}{_named(failed)}")
    if code == 5:  # pytest's "no tests were collected"
        raise RuntimeError(f"no test was selected by {' '.join(words)}")
    if code:
        raise RuntimeError(f"pytest ended with {code}: {found['said']}{_named(failed)}")
    return found


def _named(failed: list[str]) -> str:
    return f"; {'; '.join(failed[:SHOWN])}" if failed else ""


def _workers() -> list[str]:
    """pytest-xdist's processes, where it is installed: most of the time goes into ptxas, on the CPU."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 2)))]


def _ended(child: subprocess.Popen[Any], seconds: float) -> int | None:
    """The exit code, or None where the time was over: pytest then still writes its report."""
    try:
        return child.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired, OutOfTime):
            child.wait(STOP_BEFORE - 4)
        return None
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


def figures(report: Path | None, printed: str) -> dict[str, Any]:
    """Counts and failures, from the report where pytest lived to write it, else from what it printed of each test."""
    if report is not None and report.is_file():
        cases = ElementTree.parse(report).getroot().iter("testcase")
        counts = {"passed": 0, "skipped": 0}
        failed = []
        for case in cases:
            bad = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
            if bad is not None:
                failed.append(f"{case.get('name')}: {(bad.get('message') or '').splitlines()[:1]}"[:200])
            else:
                counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    else:
        lines = printed.splitlines()
        verdicts = {word: [line for line in lines if re.search(rf"\b{word}\b", line)] for word in ("PASSED", "SKIPPED")}
        counts = {"passed": len(verdicts["PASSED"]), "skipped": len(verdicts["SKIPPED"])}
        marked = (re.search(r"FAILED (\S+::.+?)(?: - |$)|(\S+::.+?) FAILED", line) for line in lines)
        failed = sorted({(found[1] or found[2]).strip() for found in marked if found})
    said = f"{counts['passed']} passed, {len(failed)} failed, {counts['skipped']} skipped"
    return {**counts, "failed": failed[:SHOWN], "said": said}


def _call(name: str, machine: Machine) -> dict[str, Any]:
    path, chosen = CALLS[name]
    return run_pytest([path, *(["-k", chosen] if chosen else [])], name, machine)


def rows(smoke: bool) -> list[Row]:
    """On the CPU every test is skipped, and collecting them once shows that they are found."""
    return [Row(name, functools.partial(_call, name)) for name in (["others"] if smoke else CALLS)]
