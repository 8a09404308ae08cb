"""Rebuild the README's tables, and the figures in docs/, from results/: python benchmarks/plot.py

Only the newest run of each file is shown; the test suite fails when the README says anything else.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

import quality_docs
import registry
import timing

README = Path(__file__).parents[1] / "README.md"
LABELS = {"forward": "forward", "both": "forward + backward", "step": "step"}


def newest(path: Path) -> list[dict[str, str]]:
    """The rows of the last run in a results file: those with the last row's date and commit."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = (rows[-1]["date"], rows[-1]["commit"])
    return [row for row in rows if (row["date"], row["commit"]) == last]


def shown(row: dict[str, str]) -> bool:
    """The README shows the first shape of each op in bfloat16 (the optimizer's in float32); the results hold all."""
    if row["dtype"] != "bfloat16" and row["op"] != "adamw8bit":
        return False
    firsts = {s[0].name for s in (registry.SELF_ATTENTION, registry.CONV, registry.ADAMW)}
    return row["shape"].split(",")[0] in firsts


def ops_table() -> str:
    rows = [row for row in newest(timing.RESULTS / "ops_cpu.csv") if shown(row)]
    if not rows:
        return "No results yet.\n"
    facts = rows[0]
    lines = [
        f"CPU ops on {facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}"
        " (median ratio, quartiles in brackets):\n",
        "| op | shape | dtype | pass | against | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{row['ratio']} ({row['quartile_low']}-{row['quartile_high']})" if row["ratio"] else "cannot run here"
        direction = LABELS[row["direction"]]
        lines.append(f"| {row['op']} | {row['shape']} | {row['dtype']} | {direction} | {row['peer']} | {ratio} |")
    return "\n".join(lines) + "\n"


def step_table() -> str:
    rows = [row for row in newest(timing.RESULTS / "step.csv") if row["size"] == "512"]
    if not rows:
        return ""
    facts = rows[0]
    lines = [
        f"One Personalized-Residuals step, forward and backward, batch 1, SD1.5 at 512, on {facts['device']},"
        f" {facts['threads']} threads, torch {facts['torch']}, {facts['date']} (median; the share is of the machine's"
        " own bf16 matrix rate in that run):\n",
        "| | seconds | over ours | share |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(f"| {row['variant']} | {row['seconds']} | {row['ours_is_faster']} | {row['share_of_machine']} |")
    return "\n".join(lines) + "\n\n"


def memory_table() -> str:
    """For each method and model the smallest of the budgets that fits, and what is used of it."""
    rows = [row for row in newest(timing.RESULTS / "memory.csv") if row["what"] == "budget" and row["fits"] == "yes"]
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
    for setting, name in quality_docs.NAMES.items():
        found = [quality_docs.column(rows, ("main", setting), m) for m in ("gap_closed", "prompt_kept", "diversity")]
        if found[0]:
            cells = [quality_docs.shown(list(values.values())) for values in found]
            lines.append(f"| {name} | {' | '.join(cells)} | {len(found[0])} |")
    said = "Likeness: 0 is the base model's picture of the class, 1 another photo of the subject; 95 % intervals.\n"
    return "\n".join(lines) + f"\n\n{said}" if len(lines) > 2 else ""


def replaced(readme: str, name: str, text: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = readme.split(begin, 1)
    return f"{before}{begin}\n{text}{end}{rest.split(end, 1)[1]}"


def with_numbers(readme: str) -> str:
    """The README with the parts between the markers made anew."""
    readme = replaced(readme, "numbers", step_table() + ops_table())
    readme = replaced(readme, "memory", memory_table())
    return replaced(readme, "quality", quality_table())


def step_figure(path: Path) -> None:
    """Seconds of a training step by variant, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in newest(timing.RESULTS / "step.csv") if row["size"] == "512"]
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
    print("README.md: the tables are made anew; docs/step.png")
