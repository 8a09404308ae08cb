"""Rebuild the README's table of numbers from results/: python benchmarks/plot.py

Only the newest run of each file is shown; the test suite fails when the README says anything else.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

import registry
import timing

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"
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
        ratio = f"{row['ratio']} ({row['quartile_low']}-{row['quartile_high']})"
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


def with_numbers(readme: str) -> str:
    """The README with the part between the markers made anew."""
    before, rest = readme.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{step_table()}{ops_table()}{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    README.write_text(with_numbers(README.read_text()))
    print(f"{README.name}: the table of numbers is made anew")
