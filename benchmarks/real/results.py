"""Rows of a results file, with where and when they were measured."""

from __future__ import annotations

import csv
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch


def machine() -> str:
    """This machine, in a few words."""
    with open("/proc/cpuinfo") as info:
        names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"


def add_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Add rows to a CSV file; its columns grow where a row has a new one."""
    facts = {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "torch": torch.__version__, "machine": machine()}
    table: list[dict[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            table = list(csv.DictReader(file))
    table += [facts | row for row in rows]
    columns = list(dict.fromkeys(name for row in table for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
