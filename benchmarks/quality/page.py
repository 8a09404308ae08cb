"""docs/quality.md and its figures from the rows of results/quality.csv: made by python -m benchmarks.quality --docs"""

from __future__ import annotations

import statistics
from pathlib import Path

from pcs_trainer.files import written_text

from . import pictures as sheets
from .claims import Claim, claims
from .jobs import KINDS, NAMES, PR, Row
from .statistics import cell, column, paired, shown, verdict

DOCS = Path(__file__).parents[2] / "docs"
SIDE_BY_SIDE = ("gap_closed", "subject_similarity", "prompted_similarity", "prompt_kept", "text_similarity",
                "drift_to_subject", "drift_distance", "class_accuracy", "diversity")  # fmt: skip


def main_table(rows: list[Row]) -> list[str]:
    lines = [
        "| method | gap closed | subject similarity | in prompts | prompts kept | text similarity "
        "| drift to the subject | drift distance | class kept | diversity | parameters | CPU seconds |",
        "|---" * 12 + "|",
    ]
    for setting, name in NAMES.items():
        where = ("main", setting)
        if not column(rows, where, "gap_closed"):
            continue
        parameters = statistics.fmean(column(rows, where, "parameters").values())
        seconds = statistics.median(column(rows, where, "train_cpu_seconds").values())
        cells = [*(cell(rows, where, m) for m in SIDE_BY_SIDE), f"{parameters:,.0f}", f"{seconds:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, *base_lines(rows)]


def base_lines(rows: list[Row]) -> list[str]:
    """What the same measures are of the base model, and of real photos of the subject."""
    base = ("main", PR)
    similarity, text, kept = (
        cell(rows, base, m) for m in ("subject_similarity_base", "text_similarity_base", "class_accuracy_base")
    )
    real, prompts = cell(rows, base, "subject_similarity_real"), cell(rows, base, "prompt_accuracy_base")
    return [
        f"| *the base model's class* | 0 | {similarity} | - | 1 | {text} | 0 | 0 | {kept} | - | - | - |",
        f"| *other photos of the subject* | 1 | {real} | - | - | - | - | - | - | - | - | - |",
        "",
        f"The base model itself does {prompts} of what the prompts ask for.",
    ]


def prompt_table(rows: list[Row]) -> list[str]:
    lines = ["| method | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for setting, name in NAMES.items():
        cells = [cell(rows, ("main", setting), f"accuracy_{k}") for k in KINDS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [cell(rows, ("main", PR), f"accuracy_{k}_base") for k in KINDS]
    return [*lines, f"| *the base model* | {' | '.join(cells)} |"]


def claim_table(rows: list[Row], group: list[Claim]) -> list[str]:
    lines = ["| claim | measure | first | second | difference | subjects | found |", "|---|---|---|---|---|---|---|"]
    for claim in group:
        first, second = paired(rows, claim)
        differences = [a - claim.share * b for a, b in zip(first, second, strict=True)]
        cells = [claim.says, claim.measure.replace("_", " "), shown(first), shown(second), shown(differences)]
        lines.append(f"| {' | '.join(cells)} | {len(first)} | {verdict(differences, claim.better)} |")
    return lines


# Said where a method is short of an aim: what was tried, on subjects that are not reported.
SHORT = {
    "textboost": "TextBoost: on a subject where it was short (0.41), twice the steps and batch with rank 16, uniform "
    "timesteps, and half and twice the learning rate left it between 0.41 and 0.47. It learns in the text encoder "
    "alone, so it draws what the frozen UNet can be told; most likely these patterns are not among that.",
}


def targets(rows: list[Row]) -> list[str]:
    """The presets' own aims: 60 % of the gap, 80 % of the prompts, one core's seconds."""
    notes: list[str] = []
    lines = [
        "| method | gap closed, mean >= 0.60 | prompts kept, mean >= 0.80 | slowest training |",
        "|---|---|---|---|",
    ]
    for setting, name in NAMES.items():
        cells: list[str] = []
        for measure, aim in (("gap_closed", 0.6), ("prompt_kept", 0.8)):
            values = list(column(rows, ("main", setting), measure).values())
            if values:
                mean = statistics.fmean(values)
                spread = f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"
                cells.append(f"{spread}: {'reached' if mean >= aim else '**short**'}")
        seconds = column(rows, ("main", setting), "train_cpu_seconds").values()
        most = 150 if setting == "dreambooth" else 90  # DreamBooth's whole UNet is allowed longer
        if seconds:
            cells.append(f"{max(seconds):.0f} s of {most} s: {'reached' if max(seconds) <= most else '**short**'}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        notes += [SHORT[setting]] if setting in SHORT and any("short" in said for said in cells) else []
    return [*lines, "", *notes]


HOW = """Made by `python -m benchmarks.quality --docs` from `benchmarks/results/quality.csv`; nothing here is written by
hand but this page's frame. Every number is of the embedded model, a thousandth of a real one in a world of 64 x 64
pictures: it says how the methods compare there, and nothing about Stable Diffusion.

{subjects} subjects that no preset was chosen on, 4 photos each, the default presets; pictures by DPM-Solver++ in 15
steps. The judge compares what is drawn with 8 further photos of the subject: *gap closed* is 0 for what the base
model draws of the class and 1 for other photos of the subject itself. *Prompts kept* is the share of what 20 prompts
ask for (places, positions, sizes, paintings, light) that the judge finds, over the base model's share; *in prompts*
is the subject similarity in those pictures. *Drift to the subject* is the gap that "a photo of a [class]" closes,
which should be nothing; *drift distance* is the kernel distance (in thousands) of the class's pictures before and
after; *class kept* is the share of them, after, that still show the class. LAG changes nothing there: its words are
not in that prompt. ± is a 95 % confidence interval over subjects. Seconds are of one core, medians, with the class's
pictures for the prior loss drawn once a class. Weights {model}, measured until {date} on
{devices}.
"""


def machines(rows: list[Row]) -> str:
    """Where the table's rows were measured, and the ablations' where that was elsewhere."""
    table = list(dict.fromkeys(row["device"] for row in rows if row["section"] == "main"))
    others = [device for device in dict.fromkeys(row["device"] for row in rows) if device not in table]
    said = " and ".join(table or others)
    return f"{said};\nsome ablations on {', '.join(others)}" if table and others else said


def text(rows: list[Row]) -> str:
    """The whole page."""
    subjects = len(column(rows, ("main", PR), "gap_closed"))
    lines = ["# Quality of the methods on the embedded model", ""]
    lines += [HOW.format(subjects=subjects, devices=machines(rows), **rows[-1])]
    lines += ["## Side by side", "", *main_table(rows), ""]
    lines += ["![subject and prompt](quality.png)", "", "## Aims of the presets", "", *targets(rows), ""]
    lines += ["## By what the prompt asks for", "", *prompt_table(rows), ""]
    lines += ["![pictures of every method](quality_sheet.png)", "", "## The papers' claims, one by one", ""]
    lines += ["Differences are first less second (or less the share of it that is named), subject by subject. A claim"]
    lines += ["holds where their 95 % interval lies on its side of 0; it is undecided where the interval holds 0.", ""]
    for name, group in claims().items():
        lines += [f"### {name}", "", *claim_table(rows, group), ""]
        if "one place" in name and (DOCS / "quality_lag.png").exists():
            lines += ["![one place: photos, plain, LAG](quality_lag.png)", ""]
    return "\n".join(lines).rstrip() + "\n"


def write(rows: list[Row], pictures: Path) -> None:
    """The page, whole or not at all, and its figures."""
    if not rows:
        raise SystemExit("there are no rows for these weights: run python -m benchmarks.quality first")
    DOCS.mkdir(exist_ok=True)
    written_text(DOCS / "quality.md", text(rows))
    sheets.figures(rows, DOCS, pictures, NAMES)
    print(f"{DOCS / 'quality.md'} is made anew from {len(rows)} rows")
