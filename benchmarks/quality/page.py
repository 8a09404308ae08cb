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
HEADS = {  # of the main table, and names of measures elsewhere
    "gap_closed": "subject fidelity",
    "subject_similarity": "subject similarity",
    "prompted_similarity": "similarity in prompts",
    "prompt_kept": "prompt fidelity",
    "text_similarity": "text similarity",
    "drift_to_subject": "class drift to the subject",
    "drift_distance": "class drift, KID / 1000",
    "class_accuracy": "class accuracy",
    "diversity": "diversity",
}
OTHERS = {f"accuracy_{kind}": f"{kind} accuracy" for kind in KINDS} | {"same_place": "share with the photos' place"}


def main_table(rows: list[Row]) -> list[str]:
    heads = ["method", *HEADS.values(), "trainable parameters", "CPU seconds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for setting, name in NAMES.items():
        where = ("main", setting)
        if not column(rows, where, "gap_closed"):
            continue
        parameters = statistics.fmean(column(rows, where, "parameters").values())
        seconds = statistics.median(column(rows, where, "train_cpu_seconds").values())
        cells = [*(cell(rows, where, m) for m in HEADS), f"{parameters:,.0f}", f"{seconds:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, *base_lines(rows)]


def base_lines(rows: list[Row]) -> list[str]:
    """The same measures for the base model, and for real photos of the subject."""
    base = ("main", PR)
    similarity, text, kept = (
        cell(rows, base, m) for m in ("subject_similarity_base", "text_similarity_base", "class_accuracy_base")
    )
    real, prompts = cell(rows, base, "subject_similarity_real"), cell(rows, base, "prompt_accuracy_base")
    return [
        f"| *base model, class images* | 0 | {similarity} | - | 1 | {text} | 0 | 0 | {kept} | - | - | - |",
        f"| *other photos of the subject* | 1 | {real} | - | - | - | - | - | - | - | - | - |",
        "",
        f"The base model itself shows {prompts} of what the prompts ask for.",
    ]


def prompt_table(rows: list[Row]) -> list[str]:
    lines = ["| method | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for setting, name in NAMES.items():
        if not column(rows, ("main", setting), "gap_closed"):
            continue
        cells = [cell(rows, ("main", setting), f"accuracy_{k}") for k in KINDS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [cell(rows, ("main", PR), f"accuracy_{k}_base") for k in KINDS]
    return [*lines, f"| *base model* | {' | '.join(cells)} |"]


def claim_table(rows: list[Row], group: list[Claim]) -> list[str]:
    lines = ["| claim | measure | first | second | difference | subjects | result |", "|---|---|---|---|---|---|---|"]
    for claim in group:
        first, second = paired(rows, claim)
        differences = [a - claim.share * b for a, b in zip(first, second, strict=True)]
        cells = [claim.says, (HEADS | OTHERS)[claim.measure], shown(first), shown(second), shown(differences)]
        lines.append(f"| {' | '.join(cells)} | {len(first)} | {verdict(differences, claim.better)} |")
    return lines


# Shown where a method misses a target: what was tried, on subjects that are not reported.
TRIED = {
    "textboost": "TextBoost: on a subject with a subject fidelity of 0.41, twice the steps and batch with rank 16, "
    "uniform timesteps, and half and twice the learning rate left it between 0.41 and 0.47. It trains the text encoder "
    "alone, so it can only reach what the frozen UNet can be told; most likely these patterns are not among that.",
}
TARGETS = {"gap_closed": 0.6, "prompt_kept": 0.8}
MOST_SECONDS = dict.fromkeys(NAMES, 90) | {"dreambooth": 150}  # on one core; DreamBooth trains the whole UNet


def target_table(rows: list[Row]) -> list[str]:
    """What the presets are held to: a subject fidelity of 0.60, a prompt fidelity of 0.80, one core's seconds."""
    notes: list[str] = []
    lines = [
        "| method | subject fidelity, mean >= 0.60 | prompt fidelity, mean >= 0.80 | slowest training |",
        "|---|---|---|---|",
    ]
    for setting, name in NAMES.items():
        where, cells, met = ("main", setting), [], []
        if not column(rows, where, "gap_closed"):
            continue
        for measure, least in TARGETS.items():
            if values := column(rows, where, measure).values():
                met.append((mean := statistics.fmean(values)) >= least)
                cells.append(f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})")
        if seconds := column(rows, where, "train_cpu_seconds").values():
            met.append(max(seconds) <= MOST_SECONDS[setting])
            cells.append(f"{max(seconds):.0f} s of {MOST_SECONDS[setting]} s")
        said = [f"{cell}: {'met' if ok else '**not met**'}" for cell, ok in zip(cells, met, strict=True)]
        lines.append(f"| {name} | {' | '.join(said)} |")
        notes += [TRIED[setting]] if setting in TRIED and not all(met) else []
    return [*lines, "", *notes]


HOW = """Generated by `python -m benchmarks.quality --docs` from `benchmarks/results/quality.csv`. Every number is
of the embedded model, a thousandth of the size of a real one, in a world of 64 x 64 images: it shows how the methods
compare there, and says nothing about Stable Diffusion.

{subjects} subjects that no preset was chosen on, 4 photos each, the default presets; images are sampled with
DPM-Solver++ in 15 steps. A judge, trained apart from the model, compares them with 8 further photos of the subject.

- *Subject fidelity*: the share of the gap closed, from 0 for the base model's images of the class to 1 for other photos
  of the subject; *similarity in prompts* is the subject similarity in the images of the 20 prompts.
- *Prompt fidelity*: the share of what 20 prompts ask for (places, positions, sizes, paintings, light) that the judge
  finds, relative to the base model's share.
- *Class drift to the subject*: the subject fidelity of "a photo of a [class]", which should be 0. *Class drift, KID*:
  the kernel distance, in thousands, between class images before and after training. *Class accuracy*: the share of
  class images after training that still show the class. LAG changes none of the three: the learned word is not in that
  prompt.
- ± is a 95 % confidence interval over subjects. CPU seconds are medians on one core, with the class images for the
  prior loss generated once per class.

Weights {model}, measured until {date} on
{devices}.
"""


def machines(rows: list[Row]) -> str:
    """Where the main table was measured, and the ablations where that was elsewhere."""
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
    lines += [
        "![Subject and prompt fidelity](quality.png)",
        "",
        "## Targets of the presets",
        "",
        *target_table(rows),
        "",
    ]
    lines += ["## Prompt accuracy, by what the prompt asks for", "", *prompt_table(rows), ""]
    lines += ["![Images of every method](quality_sheet.png)", "", "## The papers' claims, one by one", ""]
    lines += [
        "The difference is first minus second (or minus the share of it that is named), subject by subject. A claim"
    ]
    lines += ["holds where its 95 % interval lies on its side of 0; it is undecided where the interval contains 0.", ""]
    for name, group in claims().items():
        lines += [f"### {name}", "", *claim_table(rows, group), ""]
        if "one place" in name and (DOCS / "quality_lag.png").exists():
            lines += ["![Photos in one place: training photos, plain, LAG](quality_lag.png)", ""]
    return "\n".join(lines).rstrip() + "\n"


def write(rows: list[Row], pictures: Path) -> None:
    """Write the page and its figures."""
    if not rows:
        raise SystemExit("no results for these weights; run python -m benchmarks.quality first")
    DOCS.mkdir(exist_ok=True)
    written_text(DOCS / "quality.md", text(rows))
    sheets.figures(rows, DOCS, pictures, NAMES)
    print(f"{DOCS / 'quality.md'} is written from {len(rows)} rows")
