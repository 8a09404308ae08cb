"""python -m tests.ptx: every case on every architecture, both orders of copies, the counts and the mutants.

--page writes the tables into README.md and the counts into counted.json. An hour on one core; two processes share it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from tests.triton_budget import OPS

from . import mutants, report
from .cases import Check, every_check
from .counting import counted
from .faults import Fault

COUNTS = Path(__file__).with_name("counted.json")
GROUPS = ((86, 89, 80), (90,), (120,))  # of one process; equal code is looked for within a group
LARGEST_TILES = 1  # multiprocessors


@dataclass
class Row:
    architecture: int
    dtype: str
    tiles: str
    copies: str
    checked: int = 0
    same: int = 0  # as code that ran for an earlier architecture
    nothing_to_order: int = 0  # copies at once: kernels without asynchronous copies or products
    seconds: float = 0.0


def _prepare() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    triton.knobs.cache.dir = tempfile.mkdtemp()  # nothing of an earlier run


def _kinds(quick: bool) -> list[tuple[str, str, str]]:
    """dtype, tiles, copies"""
    first = [("bf16", "tables", "late")]
    more = [("fp16", "tables", "late"), ("bf16", "tables", "at once"), ("bf16", "largest", "late")]
    return first if quick else [*first, *more]


def run_group(group: tuple[int, ...], quick: bool) -> tuple[list[Row], list[str]]:
    _prepare()
    rows, failures, seen = [], [], {}
    for architecture in group:
        for dtype, tiles, copies in _kinds(quick):
            row, start = Row(architecture, dtype, tiles, copies), time.process_time()
            for check in every_check():
                failures += _one(check, row, seen)
            row.seconds = time.process_time() - start
            rows.append(row)
            print(row, flush=True)
    return rows, failures


def _one(check: Check, row: Row, seen: dict[tuple[str, str, str], set[str]]) -> list[str]:
    several = {"multiprocessors": LARGEST_TILES} if row.tiles == "largest" else {}
    asked = {"dtype": row.dtype, "architecture": row.architecture, **several}
    launches = check.run(only_compile=True, **asked).launches
    if row.copies == "at once" and not any("cp.async" in x.ptx or "wgmma" in x.ptx for x in launches):
        row.nothing_to_order += 1
        return []
    code = sha256(repr([(x.code, x.grid) for x in launches]).encode()).hexdigest()
    known = seen.setdefault((check.name, row.dtype, row.copies), set())
    if code in known:
        row.same += 1
        return []
    known.add(code)
    row.checked += 1
    try:
        check.run(copies_land_late=row.copies == "late", **asked)
    except (Fault, AssertionError) as error:
        return [f"sm_{row.architecture} {row.dtype} {row.tiles} tiles, copies {row.copies}: {check.name}: {error}"]
    return []


def cases_table(rows: list[Row]) -> str:
    head = ("architecture", "dtype", "tiles", "copies land", "cases run", "same code as before", "no copies", "seconds")
    cells = [
        (f"sm_{r.architecture}", r.dtype, r.tiles, r.copies, r.checked, r.same, r.nothing_to_order, round(r.seconds))
        for r in rows
    ]
    return report._table(head, [tuple(map(str, line)) for line in cells])


def count_all() -> tuple[dict[str, list[dict]], list[str]]:
    _prepare()
    found, wasteful = {}, []
    for op in OPS:
        kernels = counted(op, 86)
        wasteful += report.wasteful(kernels)
        found[op] = [asdict(kernel) for kernel in kernels]
    return found, wasteful


def write_counts(found: dict[str, list[dict]]) -> None:
    """One line a kernel and shape."""
    parts = [
        f" {json.dumps(op)}: [\n" + ",\n".join(f"  {json.dumps(k)}" for k in kernels) + "\n ]"
        for op, kernels in found.items()
    ]
    temporary = COUNTS.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    temporary.replace(COUNTS)


def run_mutants() -> list[str]:
    _prepare()
    print("\nmutant -> caught by")
    missed = []
    for mutant in mutants.MUTANTS:
        found = mutants.caught_by(mutant)
        print(f"  {mutant.name} ({mutant.kernel}) -> {found or 'nothing'}", flush=True)
        if found != mutant.caught_by:
            missed.append(f"the mutant {mutant.name!r} was caught by {found or 'nothing'}, not by {mutant.caught_by}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__)
    parser.add_argument("--page", action="store_true", help="write the tables of README.md, and counted.json")
    parser.add_argument("--quick", action="store_true", help="bfloat16, the tables' tiles, copies as late as may be")
    parser.add_argument("--only", choices=("cases", "counts", "mutants"), help="one of the three parts")
    given = parser.parse_args()
    failures: list[str] = []
    if given.only in (None, "cases"):
        processes = min(len(os.sched_getaffinity(0)), len(GROUPS))
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(run_group, GROUPS, [given.quick] * len(GROUPS)))
        rows = [row for found, _ in results for row in found]
        failures += [failure for _, found in results for failure in found]
        print(cases_table(rows))
        if given.page and not given.quick:
            report.write("cases", cases_table(rows))
    if given.only in (None, "counts"):
        found, wasteful = count_all()
        failures += wasteful
        if given.page:
            write_counts(found)
            report.write("exceptions", report.exceptions_table())
    if given.only in (None, "mutants"):
        failures += run_mutants()
        if given.page:
            report.write("mutants", report.mutants_table())
    print("\n".join(failures) or "nothing failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
