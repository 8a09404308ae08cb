"""The figures of docs/quality.md: a chart of the main table, and contact sheets of what the methods draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .jobs import sections
from .statistics import column, interval

CELL = 64
HEADS = ("own prompt", "on the beach", "in the snow", "at night")


def figures(rows: list[dict[str, str]], docs: Path, pictures: Path, names: dict[str, str]) -> None:
    chart(rows, docs / "quality.png", names)
    subjects = sorted({r["subject"] for r in rows if r["section"] == "main"})[:4]
    sheet("main", subjects, list(names), docs / "quality_sheet.png", pictures, names)
    lag = [n for n in names if n.startswith("personalized_residuals")]
    entangled = sorted({r["subject"] for r in rows if r["section"] == "entangled"})
    sheet("entangled", entangled[:4], lag, docs / "quality_lag.png", pictures, names)


def chart(rows: list[dict[str, str]], path: Path, names: dict[str, str]) -> None:
    """Subject fidelity against prompt fidelity: each method's mean with its 95 % interval, each subject as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), dpi=110)
    for colour, (setting, name) in enumerate(names.items()):
        x = list(column(rows, ("main", setting), "gap_closed").values())
        y = list(column(rows, ("main", setting), "prompt_kept").values())
        if len(x) < 2:
            continue
        axes.scatter(x, y, s=9, color=f"C{colour}", alpha=0.35)
        (middle, wide), (height, high) = interval(x), interval(y)
        axes.errorbar(middle, height, xerr=wide, yerr=high, fmt="o", color=f"C{colour}", label=name, capsize=3)
    axes.axvline(0.6, color="grey", linewidth=0.7, linestyle=":")
    axes.axhline(0.8, color="grey", linewidth=0.7, linestyle=":")
    axes.set_xlabel("subject fidelity (0: base model, 1: photos of the subject)")
    axes.set_ylabel("prompt fidelity (base model = 1)")
    axes.legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def sheet(
    section: str, subjects: list[str], settings: list[str], path: Path, pictures: Path, names: dict[str, str]
) -> None:
    """A block for each subject, two side by side: its training photos, then a row for each method."""
    from PIL import Image, ImageDraw

    label, head, gap = 150, 16, 12
    block = (label + 4 * CELL + gap, head + (1 + len(settings)) * CELL + gap)
    columns = 2
    lines = -(-len(subjects) // columns)
    strips = {
        (s, m): pictures / "pictures" / f"{section}-{m.replace(' ', '')}-{s}.png" for s in subjects for m in settings
    }
    missing = sum(not strip.exists() for strip in strips.values())
    if not subjects:
        return
    if missing:
        print(f"{path} is left as it is: {missing} of its strips are not on this machine")
        return
    page = Image.new("RGB", (columns * block[0], lines * block[1]), "white")
    pen = ImageDraw.Draw(page)
    for i, subject in enumerate(subjects):
        x, y = i % columns * block[0], i // columns * block[1]
        for k, words in enumerate(HEADS):
            pen.text((x + label + k * CELL + 2, y + 2), words, fill="black", font_size=10)
        pen.text((x + 4, y + head + CELL // 2 - 8), "training photos", fill="black", font_size=12)
        page.paste(Image.fromarray(learned_from(section, int(subject), pictures)), (x + label, y + head))
        for r, setting in enumerate(settings, 1):
            at = y + head + r * CELL
            pen.text(
                (x + 4, at + CELL // 2 - 8), names[setting].replace("Personalized ", ""), fill="black", font_size=12
            )
            page.paste(Image.open(strips[subject, setting]), (x + label, at))
    page.quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)


def learned_from(section: str, subject: int, pictures: Path) -> np.ndarray:
    """The four training photos in a row."""
    from pcs_trainer.tiny.subjects import photos

    jobs = [job for job in sections(50)["entangled" if section == "entangled" else "main"] if job.subject == subject]
    return np.concatenate([p.picture for p in photos(subject, 4, background=jobs[0].background or None)], axis=1)
