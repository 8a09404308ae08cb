"""Timing in turn, and results files: the variants of a case alternate in one process, and medians are compared."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def finish() -> None:
    """Wait for the GPU, if one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int = 15, least: float = 0.004
) -> dict[str, list[float]]:
    """Seconds per call of each variant, `rounds` times in turn; short calls are repeated to last `least` seconds."""
    repeats = {}
    for name, call in variants.items():
        call()
        finish()
        start = time.perf_counter()
        call()
        finish()
        repeats[name] = max(1, int(least / max(time.perf_counter() - start, 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            finish()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return seconds


def ratio(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile) of over / under, round by round."""
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    return statistics.median(ratios), quartiles[0], quartiles[2]


def cpu_name() -> str:
    """The processor, and its best instruction set for bfloat16: cloud machines often have no telling name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.processor() or platform.machine())
    units = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 bf16", "avx2": "AVX2"}
    has = next((unit for flag, unit in units.items() if flag in facts.get("flags", "").split()), "")
    return f"{name} ({has})" if has else name


def commit() -> str:
    """The commit measured; "unknown" without git or outside a clone, as on a machine that got the files alone."""
    try:
        ran = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return "unknown"
    return ran.stdout.strip() or "unknown"


def circumstances() -> dict[str, str]:
    """What every row of results carries: date, device, threads, torch version, commit."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_name()}, {os.cpu_count()} cores"
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": commit(),
    }


def read(path: Path) -> list[dict[str, str]]:
    """The rows that are there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Add rows to a CSV file, written whole or not at all; new columns widen the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old: list[Mapping[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    everything = [*old, *rows]
    columns = list(dict.fromkeys(key for row in everything for key in row))
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(everything)
    os.replace(partial, path)
