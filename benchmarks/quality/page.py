"""docs/quality.md and its figures from the rows of results/quality.csv: made by python -m benchmarks.quality --docs"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from pcs_trainer.files import written_text

from . import pictures as sheets

DOCS = Path(__file__).parents[2] / "docs"
Row = dict[str, str]
NAMES = {
    "dreambooth": "DreamBooth", "dreambooth_lora": "DreamBooth-LoRA", "custom_diffusion": "Custom Diffusion",
    "personalized_residuals": "Personalized Residuals", "personalized_residuals + LAG": "Personalized Residuals + LAG",
    "textboost": "TextBoost",
}  # fmt: skip
PR, LAG = "personalized_residuals", "personalized_residuals + LAG"
SCALES = {"drift_distance": 1e-3}  # kernel distances of the judge's features are large numbers
# 97.5 % points of Student's t for 1, 2, ... degrees of freedom
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper as a comparison that could come out the other way.

    `first` and `second` are (section, setting); `better` is "more" or "less" of `measure` in the first than `share` of
    it in the second.
    """

    says: str
    first: tuple[str, str]
    second: tuple[str, str]
    measure: str
    better: str
    share: float = 1.0


def claims() -> dict[str, list[Claim]]:
    main = lambda m: ("main", m)  # noqa: E731
    full, one_place = ("textboost", "one photo"), (("entangled", LAG), ("entangled", PR))
    kinds = ("background", "position", "size", "painting", "light")
    return {
        "DreamBooth: the prior loss": [
            Claim(f"{NAMES[m]}: with the prior loss {what}", main(m), ("prior", f"{m}, no prior loss"), measure, better)
            for m in ("dreambooth", "dreambooth_lora")
            for what, measure, better in (
                ("the class drifts less towards the subject", "drift_to_subject", "less"),
                ("the class's pictures change less", "drift_distance", "less"),
                ("prompts are kept better", "prompt_kept", "more"),
            )
        ],
        "Custom Diffusion: regularization and augmentation": [
            Claim("regularization pictures hold back drift", main("custom_diffusion"), ("custom", "no regularization"),
                  "drift_to_subject", "less"),
            Claim("regularization pictures keep prompts", main("custom_diffusion"), ("custom", "no regularization"),
                  "prompt_kept", "more"),
            Claim("augmentation brings the subject closer", ("custom", "augmentation"), main("custom_diffusion"),
                  "gap_closed", "more"),
        ],
        "Custom Diffusion: two subjects": [
            Claim("learned together they are closer than merged", ("joint", "joint"), ("joint", "merged"),
                  "gap_closed", "more"),
            Claim("a merged subject keeps 85 % of its similarity alone", ("joint", "merged"), main("custom_diffusion"),
                  "subject_similarity", "more", 0.85),
        ],
        "Personalized Residuals: where and how much": [
            Claim("on proj_out they are closer than on keys and values of as many parameters", main(PR),
                  ("place", "low-rank keys and values"), "gap_closed", "more"),
            Claim("on proj_out prompts are kept better than on keys and values", main(PR),
                  ("place", "low-rank keys and values"), "prompt_kept", "more"),
            *(Claim(f"rank 8 is closer than rank {r}", main(PR), ("rank", f"rank {r}"), "gap_closed", "more")
              for r in (1, 24)),
        ],
        "LAG, by what the prompt asks for": [
            Claim(f"LAG keeps {kind} prompts better", main(LAG), main(PR), f"accuracy_{kind}", "more") for kind in kinds
        ] + [Claim("LAG keeps 95 % of the subject", main(LAG), main(PR), "subject_similarity", "more", 0.95)],
        "LAG where all photos share one place": [
            Claim("LAG raises background accuracy", *one_place, "accuracy_background", "more"),
            Claim("LAG draws the photos' place less often in other prompts", *one_place, "same_place", "less"),
            Claim("LAG keeps 95 % of the subject", *one_place, "subject_similarity", "more", 0.95),
        ],
        "TextBoost from a single photo": [
            Claim(f"{part}: {what}", first, second, measure, "more")
            for part, first, second in (
                ("augmentation that names itself against none", ("textboost", "augmentation"), full),
                ("augmentation with words for it against without", ("textboost", "augmentation"),
                 ("textboost", "augmentation without words")),
                ("knowledge preservation against none", ("textboost", "knowledge preservation"), full),
                ("SNR timesteps against uniform ones", full, ("textboost", "uniform timesteps")),
            )
            for what, measure in (("closer to the subject", "gap_closed"), ("prompts kept better", "prompt_kept"))
        ],
    }  # fmt: skip


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval."""
    if len(values) < 2:
        return (values[0] if values else float("nan")), float("nan")
    t = T[len(values) - 2] if len(values) - 2 < len(T) else 1.96
    return statistics.fmean(values), t * statistics.stdev(values) / len(values) ** 0.5


def column(rows: list[Row], where: tuple[str, str], measure: str) -> dict[str, float]:
    """subject -> value"""
    mine = [r for r in rows if (r["section"], r["setting"]) == where and r[measure] != ""]
    return {r["subject"]: float(r[measure]) * SCALES.get(measure, 1) for r in mine}


def shown(values: list[float], digits: int = 2) -> str:
    mean, half = interval(values)
    return "-" if mean != mean else f"{mean:.{digits}f}" + ("" if half != half else f" ± {half:.{digits}f}")


def paired(rows: list[Row], claim: Claim) -> tuple[list[float], list[float]]:
    first, second = column(rows, claim.first, claim.measure), column(rows, claim.second, claim.measure)
    both = [s for s in first if s in second]
    return [first[s] for s in both], [second[s] for s in both]


def verdict(differences: list[float], better: str) -> str:
    """What the paired differences say: a claim holds where their 95 % interval lies on its side of 0."""
    if len(differences) < 2:
        return "not measured"
    mean, half = interval(differences)
    mean = mean if better == "more" else -mean
    if mean - half > 0:
        return "holds"
    if mean + half < 0:
        return "**does not hold: the reverse**"
    return "undecided: no difference seen"


def main_table(rows: list[Row]) -> list[str]:
    lines = [
        "| method | gap closed | subject similarity | in prompts | prompts kept | text similarity "
        "| drift to the subject | drift distance | class kept | diversity | parameters | CPU seconds |",
        "|---" * 12 + "|",
    ]
    for setting, name in NAMES.items():
        where = ("main", setting)
        values = lambda m: list(column(rows, where, m).values())  # noqa: E731
        if not values("gap_closed"):
            continue
        cells = [shown(values(m)) for m in ("gap_closed", "subject_similarity", "prompted_similarity", "prompt_kept",
                 "text_similarity", "drift_to_subject", "drift_distance", "class_accuracy", "diversity")]  # fmt: skip
        cells += [
            f"{statistics.fmean(values('parameters')):,.0f}",
            f"{statistics.median(values('train_cpu_seconds')):.0f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    base = ("main", PR)
    wanted = ("subject_similarity_base", "text_similarity_base", "subject_similarity_real", "prompt_accuracy_base",
              "class_accuracy_base")  # fmt: skip
    one = {m: shown(list(column(rows, base, m).values())) for m in wanted}
    lines += [
        f"| *the base model's class* | 0 | {one['subject_similarity_base']} | - | 1 | {one['text_similarity_base']} "
        f"| 0 | 0 | {one['class_accuracy_base']} | - | - | - |",
        f"| *other photos of the subject* | 1 | {one['subject_similarity_real']} | - | - | - | - | - | - | - | - | - |",
        "", f"The base model itself does {one['prompt_accuracy_base']} of what the prompts ask for.",
    ]  # fmt: skip
    return lines


def prompt_table(rows: list[Row]) -> list[str]:
    kinds = ("background", "position", "size", "painting", "light")
    lines = ["| method | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for setting, name in NAMES.items():
        cells = [shown(list(column(rows, ("main", setting), f"accuracy_{k}").values())) for k in kinds]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    cells = [shown(list(column(rows, ("main", PR), f"accuracy_{k}_base").values())) for k in kinds]
    return [*lines, "| *the base model* | " + " | ".join(cells) + " |"]


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
                low, high = min(values), max(values)
                cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f}): {'reached' if mean >= aim else '**short**'}")
        seconds, aim = (
            column(rows, ("main", setting), "train_cpu_seconds").values(),
            150 if setting == "dreambooth" else 90,
        )
        if seconds:
            cells.append(f"{max(seconds):.0f} s of {aim} s: {'reached' if max(seconds) <= aim else '**short**'}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        notes += [SHORT[setting]] if setting in SHORT and any("short" in cell for cell in cells) else []
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


def write(rows: list[Row], pictures: Path) -> None:
    """The page, whole or not at all, and its figures."""
    if not rows:
        raise SystemExit("there are no rows for these weights: run python -m benchmarks.quality first")
    subjects = len(column(rows, ("main", PR), "gap_closed"))
    lines = ["# Quality of the methods on the embedded model", ""]
    lines += [
        HOW.format(subjects=subjects, devices=machines(rows), **rows[-1]),
        "## Side by side",
        "",
        *main_table(rows),
        "",
    ]
    lines += ["![subject and prompt](quality.png)", "", "## Aims of the presets", "", *targets(rows), ""]
    lines += ["## By what the prompt asks for", "", *prompt_table(rows), ""]
    lines += ["![pictures of every method](quality_sheet.png)", "", "## The papers' claims, one by one", ""]
    lines += ["Differences are first less second (or less the share of it that is named), subject by subject. A claim"]
    lines += ["holds where their 95 % interval lies on its side of 0; it is undecided where the interval holds 0.", ""]
    for name, group in claims().items():
        lines += [f"### {name}", "", *claim_table(rows, group), ""]
        if "one place" in name and (DOCS / "quality_lag.png").exists():
            lines += ["![one place: photos, plain, LAG](quality_lag.png)", ""]
    DOCS.mkdir(exist_ok=True)
    written_text(DOCS / "quality.md", "\n".join(lines).rstrip() + "\n")
    sheets.figures(rows, DOCS, pictures, NAMES)
    print(f"{DOCS / 'quality.md'} is made anew from {len(rows)} rows")
