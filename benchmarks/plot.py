"""Write the README's tables, docs/speed.md and docs/step.png from results/: python benchmarks/plot.py

Measures nothing; takes seconds. The README shows the newest run of each results file, docs/speed.md the last run of
every machine; the test suite fails where either says anything else.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import memory
import speed_docs
from quality.jobs import NAMES, RESULTS
from quality.statistics import cell, column

README = Path(__file__).parents[1] / "README.md"


def memory_table() -> str:
    """The smallest step counted for each method and model."""
    rows = speed_docs.counted(memory.RESULTS)
    return memory.least_table(rows) if rows else ""


def quality_table() -> str:
    """The methods on unseen subjects of the embedded model's world: the newest weights' rows of results/quality.csv."""
    if not RESULTS.exists():
        return ""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row["model"] == rows[-1]["model"]]
    lines = ["| method | subject fidelity | prompt fidelity | diversity | subjects |", "|---|---|---|---|---|"]
    for setting, name in NAMES.items():
        where = ("main", setting)
        if subjects := column(rows, where, "gap_closed"):
            cells = [cell(rows, where, m) for m in ("gap_closed", "prompt_kept", "diversity")]
            lines.append(f"| {name} | {' | '.join(cells)} | {len(subjects)} |")
    return "\n".join([*lines, "", QUALITY_NOTE.strip(), ""]) if len(lines) > 2 else ""


QUALITY_NOTE = """
Subject fidelity: 0 for the base model's images of the class, 1 for other photos of the subject. Prompt fidelity: the
share of what a prompt asks for that is drawn, relative to the base model. Means with 95 % confidence intervals. For
TextBoost the variant is `causal++` (the paper's second version), because the embedded text encoder has three layers.
"""


def replaced(readme: str, name: str, text: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = readme.split(begin, 1)
    return f"{before}{begin}\n{text}{end}{rest.split(end, 1)[1]}"


def with_numbers(readme: str) -> str:
    """The README with the text between its markers replaced."""
    readme = replaced(readme, "numbers", speed_docs.summary())
    readme = replaced(readme, "memory", memory_table())
    return replaced(readme, "quality", quality_table())


def step_figure(path: Path) -> None:
    """Bars: seconds of a training step by variant."""
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
    axes.set_xlabel("seconds per step")
    axes.set_title(f"SD1.5 at 512, batch 1, {rows[0]['device']}, {rows[0]['threads']} threads", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    README.write_text(with_numbers(README.read_text()))
    docs = README.parent / "docs"
    docs.mkdir(exist_ok=True)
    step_figure(docs / "step.png")
    (docs / "speed.md").write_text(speed_docs.page())
    print("written: the tables of README.md, docs/speed.md, docs/step.png")


if __name__ == "__main__":
    main()
