"""Does float16 train as bfloat16 does? Likeness after 200 steps in each, on the embedded model.

    python benchmarks/float16.py [--subjects 4]     measure, one process, resumable
    python benchmarks/float16.py --table            the rows measured so far, with intervals

Personalized Residuals on subjects that no preset was chosen on: in float16 with its loss scale, in bfloat16 with the
same seed, and in bfloat16 with another one, which tells how far two equal runs lie apart. All three are drawn by the
float32 model, so that only the training differs, and measured by the judge that ships with it.

Takes about six minutes a subject on one core, four of them in float16, for which CPUs have no fast product. Rows go to
benchmarks/results/float16.csv.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "python")]

import timing
from quality.jobs import SUBJECTS, Job
from quality.statistics import shown

RESULTS = timing.RESULTS / "float16.csv"
METHOD = "personalized_residuals"
TRAINING: dict[str, Any] = {"steps": 200, "batch": 1, "check_backend": False}
SAME, OTHER, HALF = "bfloat16", "bfloat16, another seed", "float16"
SETTINGS = {SAME: (torch.bfloat16, 0), OTHER: (torch.bfloat16, 1), HALF: (torch.float16, 0)}
MEASURES = ("gap_closed", "subject_similarity", "prompt_kept")


def row(bench: Any, subject: int, setting: str) -> dict[str, Any]:
    """One training run, and what the judge says of it."""
    from pcs_trainer import Trainer, load_model
    from pcs_trainer.tiny.subjects import photos, subject as subject_of

    dtype, seed = SETTINGS[setting]
    kind, pictures = subject_of(subject).kind, [p.picture for p in photos(subject, 4)]
    model = load_model("tiny", dtype=dtype)
    concept = Trainer(model, METHOD, pictures, kind, seed=seed, **TRAINING).train()
    found = bench.measure(Job("float16", setting, METHOD, subject), concept, setting)
    return {"subject": subject, "class": kind, "setting": setting} | {m: f"{found[m]:.5g}" for m in MEASURES}


def table(rows: list[dict[str, str]]) -> str:
    """Means with 95 % intervals over subjects, and the paired differences of float16 and of another seed."""
    values = {
        s: {m: {r["subject"]: float(r[m]) for r in rows if r["setting"] == s} for m in MEASURES} for s in SETTINGS
    }
    lines = [f"{'':<36}" + "".join(f"{m:>22}" for m in MEASURES) + f"{'subjects':>10}"]

    def line(name: str, columns: list[list[float]]) -> None:
        lines.append(f"{name:<36}" + "".join(f"{shown(c, 3):>22}" for c in columns) + f"{len(columns[0]):>10}")

    for setting, by in values.items():
        line(setting, [list(by[m].values()) for m in MEASURES])
    for setting in (HALF, OTHER):
        mine, theirs = values[setting], values[SAME]
        both = [s for s in mine[MEASURES[0]] if s in theirs[MEASURES[0]]]
        line(f"{setting} - bfloat16", [[mine[m][s] - theirs[m][s] for s in both] for m in MEASURES])
    return "\n".join(lines)


def main() -> None:
    """Measure subject after subject, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=4, help="how many (default: 4)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("out/float16"), help="folder for what is made on the way")
    parser.add_argument("--table", action="store_true", help="print the table alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        from quality.measure import Bench

        bench, facts = Bench(options.work), timing.circumstances()
        for subject in SUBJECTS[: options.subjects]:
            for setting in SETTINGS:
                if any((r["subject"], r["setting"]) == (str(subject), setting) for r in timing.read(options.results)):
                    continue
                started = time.monotonic()
                found = row(bench, subject, setting)
                steps = {name: TRAINING[name] for name in ("steps", "batch")}
                timing.append(options.results, [found | steps | facts])
                print(f"subject {subject}, {setting}: {time.monotonic() - started:.0f} s", flush=True)
    print(table(timing.read(options.results)))


if __name__ == "__main__":
    main()
