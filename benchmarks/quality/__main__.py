"""The methods side by side on the embedded model: python -m benchmarks.quality [--section main ...] [--minutes 40]

Every method learns unseen subjects of the small world from four photos; the judge that ships with the model measures
what is drawn (pcs_trainer/evaluation/scores.py says what each number is). One row a subject and setting goes into
results/quality.csv as soon as it is measured; rows that are there for this very model are not measured again.
--docs makes docs/quality.md and its figures from the rows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# `python benchmarks/quality` puts this folder first, where statistics.py would hide Python's own.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "python")]

from quality.jobs import RESULTS, Store, model_name, sections


def spawn(options: argparse.Namespace, until: float) -> int:
    """One process a core; each takes its share."""
    command = [sys.executable, str(HERE), "--until", str(until), "--subjects", str(options.subjects)]
    command += ["--results", str(options.results), "--work", str(options.work), "--section", *options.section]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, "--share", f"{i}/{options.processes}"], env=environment)
        for i in range(options.processes)
    ]
    return max(worker.wait() for worker in workers)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(sections(2))
    parser.add_argument("--section", nargs="+", choices=names, default=names, help="which of them (default: all)")
    parser.add_argument("--subjects", type=int, default=12, help="subjects of the main table (default: 12)")
    parser.add_argument("--minutes", type=float, default=600, help="start no further training after this long")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="concepts and pictures")
    parser.add_argument("--docs", action="store_true", help="only make docs/quality.md from the results")
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.docs:
        from quality import page

        page.write(Store(options.results, model_name()).rows(), options.work / model_name())
        return 0
    until = options.until or time.time() + 60 * options.minutes
    if not options.share:
        return spawn(options, until)
    from quality.measure import measure_share

    measure_share([job for name in options.section for job in sections(options.subjects)[name]], options, until)
    return 0


if __name__ == "__main__":
    sys.exit(main())
