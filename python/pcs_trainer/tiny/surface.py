"""Patterns and shading: how a part of an object is coloured, as functions of object-space coordinates (u, v).

Periods, widths and offsets are in object space, where an object fills about [-1, 1] x [-1, 1]: three or four stripes,
dots or squares fit on it. They are part of the world that the embedded model knows: changed, its weights no longer fit.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Grid: TypeAlias = NDArray[np.floating]  # a value for each pixel, [H, W]; float32 in, float32 out
Softness: TypeAlias = float | np.floating

PATTERNS = ("plain", "striped", "dotted", "checkered")
SUBJECT_PATTERNS = ("diagonal", "rings", "zigzag", "halves", "bands", "spots", "chequer", "sectors")


def _edge(distance: Grid, softness: Softness) -> Grid:
    """1 where distance > 0, 0 where it is < 0, with a ramp as wide as a pixel."""
    return np.clip(distance / softness + 0.5, 0.0, 1.0)


def _stripes(coordinate: Grid, period: float, share: float, softness: Softness) -> Grid:
    phase = np.abs((coordinate / period) % 1.0 - 0.5) * period
    return _edge(share * period / 2 - phase, softness)


def _dots(u: Grid, v: Grid, step: float, radius: float, softness: Softness) -> Grid:
    row = np.floor(v / step)
    x = (u + 0.5 * step * (row % 2)) / step
    return _edge(radius - step * np.hypot(x - np.floor(x) - 0.5, v / step - row - 0.5), softness)


def _squares(u: Grid, v: Grid, step: float, softness: Softness) -> Grid:
    a = _stripes(u, 2 * step, 0.5, softness)
    b = _stripes(v, 2 * step, 0.5, softness)
    return a + b - 2 * a * b


def pattern(kind: str, u: Grid, v: Grid, softness: Softness, turn: int = 0) -> Grid:
    """Share of the second tone at every pixel, in [0, 1].

    Args:
        kind: one of PATTERNS or SUBJECT_PATTERNS.
        u, v: object-space coordinates of the pixels.
        softness: size of a pixel in object space; edges are that wide.
        turn: 1 swaps or mirrors the directions of a pattern that has one.
    """
    a, b = (v, u) if turn else (u, v)
    if kind == "plain":
        return np.zeros_like(u)
    if kind == "striped":
        return _stripes(a + 0.12, 0.52, 0.46, softness)
    if kind == "dotted":
        return _dots(u + 0.11, v + 0.07, 0.5, 0.17, softness)
    if kind == "checkered":
        return _squares(u, v, 0.36, softness)
    if kind == "diagonal":
        return _stripes((u + (1 - 2 * turn) * v) * 0.7071, 0.44, 0.45, softness)  # 0.7071: a diagonal of length 1
    if kind == "rings":
        return _stripes(np.hypot(u, v - 0.1), 0.46, 0.5, softness)
    if kind == "zigzag":
        return _stripes(b + 0.3 * np.abs((a / 0.5) % 1.0 - 0.5), 0.46, 0.48, softness)
    if kind == "halves":
        return _edge(a, softness)
    if kind == "bands":
        return _edge(0.2 - np.abs(np.abs(b - 0.1) - 0.36), softness)
    if kind == "spots":
        return _dots(u, v, 0.6, 0.22, softness)
    if kind == "chequer":
        return _squares(u + 0.2, v + 0.2, 0.42, softness)
    if kind == "sectors":
        angle = np.arctan2(v - 0.1, u) * 4 / np.pi + turn
        return _edge((np.abs(angle % 2.0 - 1.0) - 0.5) * np.maximum(np.hypot(u, v), 0.05), softness)
    raise ValueError(f"unknown pattern {kind!r}; known: {', '.join(PATTERNS + SUBJECT_PATTERNS)}")


def shading(u: Grid, v: Grid, side: int) -> tuple[Grid, Grid]:
    """Brightness of a rounded body lit from the upper `side` (-1 left, +1 right), and its white highlight."""
    glow = 0.96 + 0.2 * (side * u * 0.75 - v * 0.65) - 0.1 * u * u
    highlight = 0.42 * np.exp(-(((u - side * 0.36) / 0.2) ** 2 + ((v + 0.3) / 0.26) ** 2))
    return glow, highlight
