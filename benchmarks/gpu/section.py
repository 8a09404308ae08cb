"""One section in a process of its own: python -m benchmarks.gpu.section NAME --out FOLDER ... (started by __main__).

Rows that have a result are left alone, so that a process that died is followed by one that goes on behind its row.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks import timing
from benchmarks.gpu import inject
from benchmarks.gpu.book import AGAIN, DONE, FAILED, LISTING, RUNNING, WAITING, Book, sentence
from benchmarks.gpu.row import Machine, Row, Stopped, attempt, clean, context_is_lost
from benchmarks.gpu.sections import SECTIONS, rows_of


def _die_with_the_parent() -> None:
    """Linux: a section that nobody waits for any more must not go on using the GPU."""
    set_death_signal = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _stop(*_: object) -> NoReturn:
    raise Stopped("stopped by SIGTERM")


def run_rows(section: str, rows: Sequence[Row], machine: Machine, book: Book, injected: Sequence = ()) -> int:
    """Run what has no result yet, each row saved as it ends; 0, or AGAIN where only a new process can go on."""
    for number, row in enumerate(rows, 1):
        if book.status(section, row.name) != WAITING:
            continue
        if machine.left() <= 0:
            return 0
        book.put(section, row.name, {"status": RUNNING})
        try:
            found = attempt(row, machine, inject.failure(injected, section, number))
        except Stopped as stopped:
            book.put(section, row.name, stopped.args[0])
            raise
        book.put(section, row.name, found)
        clean()
        print(f"[{section}] {row.name}: {_shown(found)}", flush=True)
        if found["status"] == FAILED and (inject.LOST or context_is_lost()):
            return AGAIN
    return 0


def _shown(found: dict) -> str:
    said = str(found.get("said", ""))
    return said if found["status"] == DONE else f"{found['status']}: {said}"


def run(section: str, machine: Machine, injected: Sequence = ()) -> int:
    """List the section's rows where they are not listed yet, and run them."""
    book = Book(machine.out)
    inject.hide_packages(injected)
    try:
        rows = rows_of(section, machine.smoke)
        if not book.rows(section):
            book.plan_rows(section, timing.circumstances(), [row.name for row in rows])
    except Exception as error:
        book.put(section, LISTING, {"status": FAILED, "said": sentence(error)})
        raise
    gc.freeze()  # modules and the like: the collection between two rows looks at the rows' own objects alone
    return run_rows(section, rows, machine, book, injected)


def main() -> int:
    _die_with_the_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="until the section's limit")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--inject", default="")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    machine = Machine(given.out, given.work, given.smoke, time.monotonic() + given.seconds)
    try:
        return run(given.section, machine, inject.parsed(given.inject, list(SECTIONS)))
    except Stopped:
        return 128 + signal.SIGTERM


if __name__ == "__main__":
    sys.exit(main())
