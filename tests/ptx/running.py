"""Runs every case on every architecture, counts, breaks kernels: what `python -m tests.ptx` is made of."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
import triton

from tests.triton_budget import OPS

from . import mutants, report
from .cases import Check, every_check
from .counting import counted
from .faults import Fault

RAN = Path(__file__).with_name("ran.json")
GROUPS = ((86, 89, 80), (90,), (120,))  # of one process; equal code is looked for within a group
KINDS = {  # dtype, tiles, when copies land
    "bf16": ("bf16", "tables", "late"),
    "fp16": ("fp16", "tables", "late"),
    "at-once": ("bf16", "tables", "at once"),
    "largest": ("bf16", "largest", "late"),
}
LARGEST_TILES = 1  # multiprocessors
COUNTED = (86, 89, 90)  # RTX 3060, RTX 4090, H100: benchmarks/roofline.py


@dataclass
class Row:
    architecture: int
    dtype: str
    tiles: str
    copies: str
    checked: int = 0
    same: int = 0  # as code that ran for an earlier architecture
    nothing_to_order: int = 0  # copies at once: kernels without asynchronous copies or products
    seconds: int = 0


def _prepare() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    triton.knobs.cache.dir = tempfile.mkdtemp()  # nothing of an earlier run


def run_group(group: tuple[int, ...], kinds: list[str]) -> tuple[list[Row], list[str]]:
    _prepare()
    rows, failures, seen = [], [], {}
    for architecture in group:
        for dtype, tiles, copies in (KINDS[kind] for kind in kinds):
            row, start = Row(architecture, dtype, tiles, copies), time.process_time()
            for check in every_check():
                failures += _one(check, row, seen)
            row.seconds = round(time.process_time() - start)
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


def kept(rows: list[Row]) -> list[Row]:
    """These rows and those that an earlier run wrote, of the same Triton: one for each architecture and kind."""
    earlier = json.loads(RAN.read_text()) if RAN.exists() else {}
    before = earlier["rows"] if earlier.get("triton") == triton.__version__ else []
    found = {(r.architecture, r.dtype, r.tiles, r.copies): r for r in (*(Row(**row) for row in before), *rows)}
    every = [found[key] for key in sorted(found)]
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in every)
    temporary = RAN.with_suffix(".tmp")
    temporary.write_text(f'{{\n "triton": {json.dumps(triton.__version__)},\n "rows": [\n{lines}\n ]\n}}\n')
    temporary.replace(RAN)
    return every


def cases_table(rows: list[Row]) -> str:
    head = ("architecture", "dtype", "tiles", "copies land", "cases run", "same code as before", "no copies", "seconds")
    cells = [
        (f"sm_{r.architecture}", r.dtype, r.tiles, r.copies, r.checked, r.same, r.nothing_to_order, r.seconds)
        for r in rows
    ]
    return report._table(head, [tuple(map(str, line)) for line in cells])


def count_all(shown: bool) -> tuple[dict[int, dict[str, list[dict]]], list[str]]:
    """Every launch of the tables, or report.some_shapes: what they do on each architecture, and which move more than
    they must."""
    _prepare()
    found, wasteful = {}, []
    for architecture in COUNTED:
        found[architecture] = {}
        for op in OPS:
            kernels = counted(op, architecture, report.some_shapes(op))
            if not shown:  # a specialisation is counted once, at the first shape that has it: those shown come first
                names = {kernel.name for kernel in kernels}
                kernels += [kernel for kernel in counted(op, architecture) if kernel.name not in names]
            wasteful += [f"sm_{architecture}: {sentence}" for sentence in report.wasteful(kernels)]
            found[architecture][op] = [asdict(kernel) for kernel in kernels]
            print(f"counted {op} on sm_{architecture}", flush=True)
    return found, wasteful


def write_counts(found: dict[int, dict[str, list[dict]]]) -> None:
    """One line a kernel and shape."""
    parts = []
    for architecture, ops in found.items():
        lists = [
            f"  {json.dumps(op)}: [\n" + ",\n".join(f"   {json.dumps(k)}" for k in kernels) + "\n  ]"
            for op, kernels in ops.items()
        ]
        parts.append(f' "sm_{architecture}": {{\n' + ",\n".join(lists) + "\n }")
    temporary = report.COUNTS.with_suffix(".tmp")
    temporary.write_text(f'{{\n "triton": {json.dumps(triton.__version__)},\n' + ",\n".join(parts) + "\n}\n")
    temporary.replace(report.COUNTS)


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
