"""Figures of a report: images as data URIs, attention maps as coloured layers, loss curves as inline SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

LARGEST = 640  # pixels a side, the width at which the page zooms (40rem); larger images are shrunk
EXACT = 256  # pixels a side up to which an image is stored as PNG, without loss
MAP_SIDE = 40  # pixels of an attention map; the browser upsamples it smoothly
MOST_POINTS = 800  # of a curve: two for each unit of WIDTH, more than the eye resolves
# Of a curve and its margins, in units of the SVG's viewBox.
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 400, 220, 40, 22, 8, 6
# RGBA from a map's minimum to its maximum: pixels without attention go dark, those with it keep their colours and glow.
RAMP = np.array([[12, 10, 30, 200], [44, 24, 62, 165], [190, 86, 50, 105], [255, 186, 80, 60], [255, 246, 190, 36]])


def picture(value: Any) -> Any:
    """A PIL picture from a path, a PIL picture, or a uint8 array [H, W, 3]."""
    from PIL import Image

    if isinstance(value, (str, Path)):
        with Image.open(value) as opened:
            return opened.convert("RGB")
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
            raise ValueError(f"a picture's array must be uint8 [H, W, 3], not {value.dtype} {list(value.shape)}")
        return Image.fromarray(value)
    return value.convert("RGB")


def data_uri(value: Any) -> str:
    """The data URI of an image: PNG up to EXACT pixels a side, else JPEG of at most LARGEST."""
    shown = picture(value)
    small = max(shown.size) <= EXACT
    if max(shown.size) > LARGEST:
        shown.thumbnail((LARGEST, LARGEST))
    return _encoded(shown, "PNG" if small else "JPEG")


def _encoded(shown: Any, form: str) -> str:
    file = io.BytesIO()
    shown.save(file, form, **({"optimize": True} if form == "PNG" else {"quality": 88}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def heat(values: Any, side: int = 64) -> Any:
    """A map [h, w] of any range as a see-through RGBA picture: its own minimum is dark, its maximum is bright."""
    from PIL import Image

    grid = np.asarray(values, np.float32)
    if grid.ndim != 2 or not np.isfinite(grid).all():
        raise ValueError(f"an attention map must be finite and of two dimensions, not {list(grid.shape)}")
    low, high = float(grid.min()), float(grid.max())
    grid = (grid - low) / (high - low) if high > low else np.zeros_like(grid)
    width = max(1, round(side * grid.shape[1] / grid.shape[0]))
    grid = np.asarray(Image.fromarray(grid, "F").resize((width, side), Image.Resampling.BICUBIC)).clip(0, 1)
    stops = np.linspace(0, 1, len(RAMP))
    layers = [np.interp(grid, stops, RAMP[:, c]) for c in range(4)]
    return Image.fromarray(np.stack(layers, -1).round().astype(np.uint8), "RGBA")


def heat_uri(values: Any) -> str:
    """The data URI of `heat`."""
    return _encoded(heat(values, MAP_SIDE), "PNG")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from low to high."""
    raw = (high - low) / max(1, count)
    if raw <= 0:
        return [low]
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def limits(lines: Sequence[dict[str, Any]]) -> tuple[float, float, float, float]:
    """x and y ranges; a few spikes of a raw loss do not flatten all the rest."""
    x = np.concatenate([np.asarray(line["x"], float) for line in lines])
    y = np.concatenate([np.asarray(line["y"], float) for line in lines])
    fine = np.isfinite(y)
    if not fine.any():
        raise ValueError("a curve without a finite value cannot be drawn")
    low, high = np.percentile(y[fine], [0, 99])  # one value in a hundred may be a spike
    pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    bottom = 0.0 if low >= 0 and low < 0.5 * high else low - pad
    return float(x.min()), float(max(x.max(), x.min() + 1)), float(bottom), float(high + pad)


def curve_svg(name: str, lines: Sequence[dict[str, Any]]) -> str:
    """Lines {label, x, y, colour, raw} over the same axes, in colours that the page gives."""
    x0, x1, y0, y1 = limits(lines)

    def across(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (min(max(y, y0), y1) - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP)

    parts = [f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}: loss by step">']
    for y in ticks(y0, y1):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(y) + 3.5:.1f}" text-anchor="end">{y:.3g}</text>')
    for x in ticks(x0, x1, 5):
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{x:.0f}</text>')
    for line in lines:
        points = [(x, y) for x, y in zip(line["x"], line["y"], strict=True) if math.isfinite(y)]
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in thinned(points))
        kind = "raw" if line.get("raw") else "line"
        parts.append(f'<polyline class="{kind} s{line["colour"]}" points="{path}"/>')
    return "".join([*parts, "</svg>"])


def thinned(points: list[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Every n-th point and the last, so that a long run does not fill the page."""
    step = max(1, math.ceil(len(points) / most))
    return points[::step] + ([points[-1]] if points and (len(points) - 1) % step else [])
