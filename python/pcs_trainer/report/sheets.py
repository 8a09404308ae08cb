"""Image files of the demo: contact sheet, loss curves, attention maps laid over the images."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import written
from .figures import heat, limits, picture, thinned, ticks

# The colours of the page (template.html), light scheme.
PAPER, INK, QUIET, LINE = (251, 250, 248), (30, 29, 27), (107, 104, 98), (226, 223, 216)
COLOURS = ((168, 68, 28), (47, 102, 144), (107, 127, 42))
CELL, GAP, MARGIN = 128, 8, 24


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _canvas(width: int, height: int) -> tuple[Any, Any]:
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (width, height), PAPER)
    return sheet, ImageDraw.Draw(sheet)


def save_picture(shown: Any, path: Path) -> Path:
    """Write a PIL image as PNG, whole or not at all, and return its path."""
    return written(path, lambda part: shown.save(part, "PNG", optimize=True))


def contact_sheet(photos: Sequence[Any], columns: dict[str, list[Any]], prompts: Sequence[str]) -> Any:
    """A PIL image with the photos on top and the samples below.

    Args:
        photos: what `figures.picture` takes.
        columns: title -> one image a prompt; None leaves an empty frame.
        prompts: title of each row.
    """
    from PIL import Image

    step, head, top = CELL + GAP, 44, MARGIN + 26 + CELL + 36
    side = MARGIN + 132  # the prompts stand to the left
    width = side + max(len(columns) * step, len(photos) * step) - GAP + MARGIN
    sheet, pen = _canvas(width, top + head + len(prompts) * step + MARGIN)
    pen.text((MARGIN, MARGIN), "photos", fill=INK, font=_font(15))
    for i, photo in enumerate(photos):
        shown = picture(photo).resize((CELL, CELL), Image.Resampling.BICUBIC)
        sheet.paste(shown, (side + i * step, MARGIN))
    for c, (name, pictures) in enumerate(columns.items()):
        x = side + c * step
        lines = textwrap.wrap(name, 17)
        pen.multiline_text((x, top + head - 8), "\n".join(lines), fill=INK, font=_font(14), anchor="ld", spacing=2)
        for r, shown in enumerate(pictures):
            y = top + head + r * step
            if shown is None:
                pen.rectangle((x, y, x + CELL, y + CELL), outline=LINE)
                continue
            sheet.paste(picture(shown).resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
    for r, prompt in enumerate(prompts):
        text = "\n".join(textwrap.wrap(prompt, 17))
        pen.multiline_text((MARGIN, top + head + r * step), text, fill=QUIET, font=_font(13), spacing=3)
    return sheet


def loss_curves(curves: Sequence[dict[str, Any]]) -> Any:
    """A PIL image with one panel a run, two in a row: every step thin, smoothed bold, subject and prior apart."""
    width, height, scale = 480, 280, 2
    rows = math.ceil(len(curves) / 2)
    sheet, pen = _canvas(2 * width * scale, rows * height * scale)
    for i, curve in enumerate(curves):
        _panel(pen, curve, (i % 2 * width, i // 2 * height, width, height), scale)
    return sheet


def _panel(pen: Any, curve: dict[str, Any], box: tuple[int, int, int, int], scale: int) -> None:
    names = [n for n in ("loss", "smoothed", "subject", "prior") if curve.get(n)]
    x0, x1, y0, y1 = limits([{"x": curve["steps"], "y": curve[n]} for n in names])
    left, top = box[0] + 56, box[1] + 40
    right, bottom = box[0] + box[2] - 16, box[1] + box[3] - 34

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (min(max(y, y0), y1) - y0) / (y1 - y0)
        return scale * (left + across * (right - left)), scale * (bottom - up * (bottom - top))

    small = _font(11 * scale)
    pen.text((scale * (box[0] + 16), scale * (box[1] + 12)), curve["name"], fill=INK, font=_font(14 * scale))
    for y in ticks(y0, y1):
        pen.line((at(x0, y), at(x1, y)), fill=LINE, width=scale)
        pen.text((scale * (left - 8), at(x0, y)[1]), f"{y:.3g}", fill=QUIET, font=small, anchor="rm")
    for x in ticks(x0, x1, 5):
        pen.text((at(x, y0)[0], scale * (bottom + 8)), f"{x:.0f}", fill=QUIET, font=small, anchor="ma")
    legend = scale * right
    for name, colour in zip(("prior", "subject", "smoothed"), reversed(COLOURS), strict=True):
        if name in names:
            pen.text((legend, scale * (box[1] + 14)), name, fill=colour, font=small, anchor="ra")
            legend -= pen.textlength(name, small) + 12 * scale
    for name in names:
        colour = COLOURS[max(0, ("smoothed", "subject", "prior").index(name))] if name != "loss" else (226, 192, 174)
        points = thinned([(x, y) for x, y in zip(curve["steps"], curve[name], strict=True) if math.isfinite(y)])
        pen.line([at(x, y) for x, y in points], fill=colour, width=scale if name == "loss" else 2 * scale)


def attention_sheet(items: Sequence[dict[str, Any]], shown: int = 6) -> Any:
    """A PIL image with one row an item (label, picture, maps): the picture, then `shown` of its maps laid over it."""
    from PIL import Image

    step, side = CELL + GAP, MARGIN + 132
    sheet, pen = _canvas(side + (shown + 1) * step + MARGIN, MARGIN + 24 + len(items) * step + MARGIN)
    for r, item in enumerate(items):
        base = picture(item["picture"]).resize((CELL, CELL), Image.Resampling.BICUBIC)
        y, last = MARGIN + 24 + r * step, len(item["maps"]) - 1
        text = "\n".join(textwrap.wrap(item["label"], 17))
        pen.multiline_text((MARGIN, y), text, fill=INK, font=_font(13), spacing=3)
        sheet.paste(base, (side, y))
        for k in range(shown):
            number = round(k * last / max(1, shown - 1))
            laid = heat(item["maps"][number], CELL).resize((CELL, CELL))
            sheet.paste(Image.alpha_composite(base.convert("RGBA"), laid).convert("RGB"), (side + (k + 1) * step, y))
            if r == 0:
                place = (side + (k + 1) * step, MARGIN + 18)
                pen.text(place, f"step {number + 1}", fill=QUIET, font=_font(12), anchor="ls")
    return sheet
