"""Rebuild the README's tables, docs/speed.md and its figure from results/: python benchmarks/plot.py

Only the newest run of each file is shown; the test suite fails when the README says anything else.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

import speed_docs
import timing
from quality.jobs import NAMES
from quality.statistics import cell, column

README = Path(__file__).parents[1] / "README.md"


def memory_table() -> str:
    """For each method and model the smallest of the budgets that fits, and what is used of it."""
    rows = [
        row
        for row in speed_docs.newest(timing.RESULTS / "memory.csv")
        if row["what"] == "budget" and row["fits"] == "yes"
    ]
    if not rows:
        return ""
    models = list(dict.fromkeys(f"{row['model']} {row['resolution']}" for row in rows))
    lines = [
        "The smallest card of 4, 6, 8, 12 or 24 GB that a training step fits on, counted, 0.5 GB for CUDA included:\n"
    ]
    lines += [f"| method | {' | '.join(models)} |", "|---" * (1 + len(models)) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for model in models:
            fitting = [r for r in rows if r["method"] == method and f"{r['model']} {r['resolution']}" == model]
            least = min(fitting, key=lambda r: float(r["budget_gb"]), default=None)
            cells.append(f"{least['budget_gb']} GB ({float(least['with_context_gb']):.1f} used)" if least else "more")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def quality_table() -> str:
    """The methods on unseen subjects of the small world: the latest model's rows of results/quality.csv."""
    path = timing.RESULTS / "quality.csv"
    if not path.exists():
        return ""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row["model"] == rows[-1]["model"]]
    lines = [
        "| method | likeness: share of the gap closed | prompts kept | diversity | subjects |",
        "|---|---|---|---|---|",
    ]
    for setting, name in NAMES.items():
        where = ("main", setting)
        if subjects := column(rows, where, "gap_closed"):
            cells = [cell(rows, where, m) for m in ("gap_closed", "prompt_kept", "diversity")]
            lines.append(f"| {name} | {' | '.join(cells)} | {len(subjects)} |")
    said = (
        "Likeness: 0 is the base model's picture of the class, 1 another photo of the subject; 95 % intervals."
        ' TextBoost is its second version here (`variant="causal++"`): the embedded text encoder has three layers.\n'
    )
    return "\n".join(lines) + f"\n\n{said}" if len(lines) > 2 else ""


def replaced(readme: str, name: str, text: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = readme.split(begin, 1)
    return f"{before}{begin}\n{text}{end}{rest.split(end, 1)[1]}"


def with_numbers(readme: str) -> str:
    """The README with the parts between the markers made anew."""
    readme = replaced(readme, "numbers", "".join(speed_docs.tables(0)))
    readme = replaced(readme, "memory", memory_table())
    return replaced(readme, "quality", quality_table())


def step_figure(path: Path) -> None:
    """Seconds of a training step by variant, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = speed_docs.steps()
    if not rows:
        return
    names, values = [row["variant"] for row in rows], [float(row["seconds"]) for row in rows]
    spread = [
        [v - float(r["fastest"]) for v, r in zip(values, rows)],
        [float(r["slowest"]) - v for v, r in zip(values, rows)],
    ]
    colours = ["#2f6fb0" if name.startswith("pcs") else "#b9bec6" for name in names]
    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    axes.barh(names[::-1], values[::-1], xerr=[s[::-1] for s in spread], color=colours[::-1], ecolor="#555", capsize=2)
    axes.set_xlabel("seconds a step")
    axes.set_title(f"SD1.5 at 512, batch 1, {rows[0]['device']}, {rows[0]['threads']} threads", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    README.write_text(with_numbers(README.read_text()))
    docs = README.parent / "docs"
    docs.mkdir(exist_ok=True)
    step_figure(docs / "step.png")
    (docs / "speed.md").write_text(speed_docs.page())
    print("README.md and docs/speed.md: the tables are made anew; docs/step.png")
