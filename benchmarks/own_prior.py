"""What the prior loss compares with, on the embedded model: class images, the model's own prediction, or nothing.

    python benchmarks/own_prior.py [--subjects 12] [--minutes 600]      measure, one process, resumable
    python benchmarks/own_prior.py --table                              the rows measured so far, with intervals

Each row of benchmarks/results/own_prior.csv is one training run on a subject that no preset was chosen on, measured by
the judge that ships with the model, as benchmarks/quality does.

Takes about two minutes a training run on one core: two and a half hours for the 72 runs of 12 subjects.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "python")]

import timing
from quality.jobs import SUBJECTS, Job, Row, Store, model_name
from quality.statistics import column, interval, shown

RESULTS = timing.RESULTS / "own_prior.csv"
SECTION = "prior kind"
METHODS = ("dreambooth_lora", "dreambooth")
KINDS = {"class images": {}, "own prediction": {"prior": "own"}, "no prior loss": {"prior_weight": 0.0}}
MEASURES = {
    "gap_closed": "subject fidelity",
    "prompt_kept": "prompt fidelity",
    "drift_to_subject": "class drift to the subject",
    "drift_distance": "class drift, KID",
}


def jobs(count: int) -> list[Job]:
    """Every setting of the first subject, then of the second: what is there when time ends is balanced."""
    return [
        Job(SECTION, f"{method}, {kind}", method, subject, overrides)
        for method in METHODS
        for subject in SUBJECTS[:count]
        for kind, overrides in KINDS.items()
    ]


def table(rows: list[Row]) -> list[str]:
    """Means with 95 % intervals over subjects, then the paired differences of the own prediction to the others."""
    lines = ["| | subjects | " + " | ".join(MEASURES.values()) + " |", "|---" * (len(MEASURES) + 2) + "|"]
    for method in METHODS:
        found = {k: {m: column(rows, (SECTION, f"{method}, {k}"), m) for m in MEASURES} for k in KINDS}
        for kind, columns in found.items():
            cells = [shown(list(values.values())) for values in columns.values()]
            lines.append(f"| {method}, {kind} | {len(columns['gap_closed'])} | " + " | ".join(cells) + " |")
        for other in ("class images", "no prior loss"):
            cells, count = [], 0
            for measure in MEASURES:
                first, second = found["own prediction"][measure], found[other][measure]
                differences = [first[s] - second[s] for s in first if s in second]
                count = len(differences)
                mean, half = interval(differences)
                cells.append("-" if mean != mean else f"{mean:+.2f}" + ("" if half != half else f" ± {half:.2f}"))
            lines.append(f"| {method}: own prediction minus {other} | {count} | " + " | ".join(cells) + " |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=12, help="subjects of each setting (default: 12)")
    parser.add_argument("--minutes", type=float, default=600, help="start no training run after this long")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV file to add rows to")
    parser.add_argument("--work", type=Path, default=Path("out/own_prior"), help="folder for concepts")
    parser.add_argument("--table", action="store_true", help="print what was measured, measure nothing")
    options = parser.parse_args(argv)
    if options.table:
        print("\n".join(table(Store(options.results, model_name()).rows())))
        return 0
    from quality.measure import measure_share

    os.environ.setdefault("PCS_CACHE", str(options.work / "cache"))  # class images are sampled once a class
    options.share = "0/1"
    measure_share(jobs(options.subjects), options, time.time() + 60 * options.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
