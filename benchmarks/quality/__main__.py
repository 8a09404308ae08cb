"""The methods side by side on the embedded model: python -m benchmarks.quality [--section main ...] [--minutes 40]

Every method trains on four photos of subjects that no preset was chosen on; the judge that ships with the model
measures what is sampled (pcs_trainer/evaluation/scores.py explains each score), and ablations test the papers' claims.

Everything takes about 90 minutes on two cores, the main table alone a third of that; --minutes stops earlier. A row for
each subject and setting goes into benchmarks/results/quality.csv as soon as it is measured, concepts and images into
--work; rows that are there for the same weights are not measured again. --docs measures nothing and writes
docs/quality.md and its figures from the rows.
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
    """Start a process for each core; each takes its share of the jobs."""
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
    parser.add_argument(
        "--section", nargs="+", choices=names, default=names, help="the main table, or ablations (default: all)"
    )
    parser.add_argument("--subjects", type=int, default=12, help="subjects in the main table (default: 12)")
    parser.add_argument("--minutes", type=float, default=600, help="start no training run after this long")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one a core")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV file to add rows to")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="folder for concepts and images")
    parser.add_argument("--docs", action="store_true", help="write docs/quality.md from the results, measure nothing")
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
