"""python -m tests.ptx: every case on every architecture, both orders of copies, the counts and the mutants.

With --page it writes what ran into ran.json, the counts into counted.json and both into the tables of README.md.
Takes about an hour on one core; a process an architecture shares it.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from . import report, running


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__)
    parser.add_argument("--page", action="store_true", help="write ran.json, counted.json and the tables of README.md")
    parser.add_argument("--architectures", type=int, nargs="+", default=sum(running.GROUPS, ()), metavar="SM")
    parser.add_argument(
        "--kinds", nargs="+", choices=running.KINDS, default=list(running.KINDS), help="of runs of all cases"
    )
    parser.add_argument("--only", choices=("cases", "counts", "mutants"), help="one of the three parts")
    parser.add_argument("--shown", action="store_true", help="count at a few real shapes an op")
    given = parser.parse_args()
    failures: list[str] = []
    if given.only in (None, "cases"):
        groups = [tuple(sm for sm in group if sm in given.architectures) for group in running.GROUPS]
        groups = [group for group in groups if group]
        processes = min(len(os.sched_getaffinity(0)), len(groups))
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(running.run_group, groups, [given.kinds] * len(groups)))
        rows = [row for found, _ in results for row in found]
        failures += [failure for _, found in results for failure in found]
        print(running.cases_table(rows))
        if given.page:
            report.write("cases", running.cases_table(running.kept(rows)))
    if given.only in (None, "counts"):
        found, wasteful = running.count_all(given.shown)
        failures += wasteful
        if given.page:
            running.write_counts(found)
            report.write("exceptions", report.exceptions_table())
    if given.only in (None, "mutants"):
        failures += running.run_mutants()
        if given.page:
            report.write("mutants", report.mutants_table())
    print("\n".join(failures) or "nothing failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
