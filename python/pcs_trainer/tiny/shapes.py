"""The silhouettes of the tiny world: each class is a short list of polygons, painted back to front.

Object space: x to the right, y downwards, the object fills about [-1, 1] x [-1, 1] and stands on y = 1.
Roles say how a part is coloured: `body` carries the main colour and the pattern, `trim` the main colour in a darker
tone (a subject gives it a colour of its own), every other role is a fixed colour of `ROLE_COLOURS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Outline: TypeAlias = NDArray[np.float64]  # the corners of a polygon, [N, 2]

ROLE_COLOURS = {
    "dark": (38, 36, 44),
    "white": (250, 250, 246),
    "cream": (243, 228, 200),
    "glass": (178, 222, 242),
    "wood": (122, 78, 44),
    "gold": (246, 190, 48),
    "flame": (250, 120, 30),
    "pink": (236, 128, 140),
}


@dataclass(frozen=True)
class Part:
    """One polygon; `hole` is cut out of it."""

    role: str
    outline: Outline
    hole: Outline | None = None


def oval(
    cx: float,
    cy: float,
    rx: float,
    ry: float,
    start: float = 0.0,
    stop: float = 360.0,
    power: float = 2.0,
    points: int = 36,
) -> Outline:
    """An ellipse, or the arc of one.

    Args:
        cx, cy, rx, ry: centre and radii.
        start, stop: ends of the arc in degrees, from the right and clockwise.
        power: exponent of the ellipse; above 2 it is squarer, below 2 pointed.
        points: corners of the polygon.
    """
    angle = np.radians(np.linspace(start, stop, points))
    cos, sin = np.cos(angle), np.sin(angle)
    x = np.sign(cos) * np.abs(cos) ** (2 / power)
    y = np.sign(sin) * np.abs(sin) ** (2 / power)
    return np.stack([cx + rx * x, cy + ry * y], 1)


def poly(*points: tuple[float, float]) -> Outline:
    """A polygon from its corners."""
    return np.array(points, dtype=float)


def join(*pieces: Outline) -> Outline:
    """One polygon from pieces that follow each other."""
    return np.concatenate(pieces)


def ring(role: str, cx: float, cy: float, rx: float, ry: float, width: float, power: float = 2.0) -> Part:
    """An oval with a hole that leaves a band of `width`."""
    return Part(role, oval(cx, cy, rx, ry, power=power), oval(cx, cy, rx - width, ry - width, power=power))


HANDLES = ("round", "square", "pointed", "double")


def handle(style: str, cx: float, cy: float, rx: float, ry: float, width: float) -> list[Part]:
    """The grip of a mug, teapot, umbrella or bag in one of the four HANDLES."""
    if style == "double":
        return [
            ring("trim", cx, cy - ry * 0.5, rx, ry * 0.6, width),
            ring("trim", cx, cy + ry * 0.5, rx, ry * 0.6, width),
        ]
    return [ring("trim", cx, cy, rx, ry, width, {"round": 2.0, "square": 6.0, "pointed": 1.2}[style])]


def eye(x: float, y: float, r: float) -> list[Part]:
    """An eye that looks to the left."""
    return [Part("white", oval(x, y, r, r)), Part("dark", oval(x - 0.25 * r, y, r * 0.6, r * 0.6))]


def mug(grip: str) -> list[Part]:
    body = join(poly((-0.72, -0.72)), poly((0.48, -0.72)), oval(-0.12, 0.78, 0.54, 0.2, 0, 180))
    return [
        *handle(grip, 0.5, 0.05, 0.46, 0.52, 0.17),
        Part("body", body),
        Part("body", oval(-0.12, -0.72, 0.6, 0.16)),
        Part("dark", oval(-0.12, -0.72, 0.49, 0.1)),
    ]


def teapot(grip: str) -> list[Part]:
    spout = poly((-0.45, 0.05), (-0.86, -0.5), (-1.06, -0.5), (-0.72, 0.45), (-0.4, 0.7))
    return [
        *handle(grip, 0.68, 0.15, 0.36, 0.46, 0.14),
        Part("trim", spout),
        Part("trim", poly((-0.36, 0.8), (0.36, 0.8), (0.44, 1.0), (-0.44, 1.0))),
        Part("body", oval(0, 0.25, 0.74, 0.66)),
        Part("trim", oval(0, -0.34, 0.42, 0.2)),
        Part("gold", oval(0, -0.6, 0.15, 0.15)),
    ]


def fish() -> list[Part]:
    tail = poly((0.4, 0.1), (1.02, -0.46), (0.86, 0.1), (1.02, 0.66))
    fin = poly((-0.35, -0.25), (0.1, -0.78), (0.45, -0.62), (0.3, -0.1))
    belly = poly((-0.2, 0.45), (0.05, 0.86), (0.3, 0.75), (0.2, 0.35))
    return [
        Part("trim", tail),
        Part("trim", fin),
        Part("trim", belly),
        Part("body", oval(-0.18, 0.1, 0.78, 0.52)),
        *eye(-0.6, -0.04, 0.16),
        Part("dark", poly((-0.94, 0.22), (-0.66, 0.28), (-0.94, 0.3))),
    ]


def bird() -> list[Part]:
    legs = [
        Part("flame", poly((x, 0.6), (x + 0.09, 0.6), (x + 0.09, 1.0), (x - 0.12, 1.0), (x - 0.12, 0.92), (x, 0.92)))
        for x in (-0.12, 0.18)
    ]
    return [
        *legs,
        Part("trim", poly((0.4, 0.05), (1.05, -0.4), (1.0, 0.2), (0.5, 0.5))),
        Part("gold", poly((-0.68, -0.58), (-1.08, -0.36), (-0.68, -0.26))),
        Part("body", join(oval(0.1, 0.22, 0.6, 0.5, -60, 190), oval(-0.44, -0.45, 0.36, 0.36, 150, 350))),
        Part("trim", join(oval(0.2, 0.12, 0.4, 0.34, 0, 180), poly((-0.1, 0.0)))),
        *eye(-0.5, -0.5, 0.14),
    ]


def cat() -> list[Part]:
    ears = [Part("body", poly((s * 0.52, -0.35), (s * 0.5, -0.98), (s * 0.06, -0.6))) for s in (-1, 1)]
    inner = [Part("pink", poly((s * 0.42, -0.5), (s * 0.42, -0.8), (s * 0.2, -0.62))) for s in (-1, 1)]
    eyes = [
        part
        for s in (-1, 1)
        for part in (Part("gold", oval(s * 0.22, -0.34, 0.13, 0.12)), Part("dark", oval(s * 0.22, -0.34, 0.06, 0.12)))
    ]
    tail = ring("trim", 0.58, 0.5, 0.36, 0.46, 0.16)
    paws = [Part("cream", oval(s * 0.22, 0.92, 0.19, 0.1)) for s in (-1, 1)]
    return [
        tail,
        Part("body", oval(0, 0.45, 0.52, 0.56, power=2.4)),
        *ears,
        Part("body", oval(0, -0.3, 0.56, 0.42)),
        *inner,
        *eyes,
        Part("pink", poly((-0.08, -0.16), (0.08, -0.16), (0, -0.06))),
        *paws,
    ]


def car() -> list[Part]:
    wheels = [
        part
        for x in (-0.52, 0.52)
        for part in (Part("dark", oval(x, 0.52, 0.26, 0.26)), Part("white", oval(x, 0.52, 0.11, 0.11)))
    ]
    windows = [
        Part("glass", poly((-0.4, -0.1), (-0.28, -0.42), (-0.04, -0.42), (-0.04, -0.1))),
        Part("glass", poly((0.06, -0.1), (0.06, -0.42), (0.3, -0.42), (0.5, -0.1))),
    ]
    shell = poly(
        (-1.0, 0.5),
        (-1.0, 0.1),
        (-0.9, -0.05),
        (-0.58, -0.12),
        (-0.4, -0.6),
        (0.38, -0.6),
        (0.68, -0.12),
        (0.96, 0.0),
        (1.0, 0.5),
    )
    return [Part("body", shell), *windows, *wheels, Part("gold", oval(-0.92, 0.14, 0.1, 0.09))]


def boat() -> list[Part]:
    hull = join(poly((-1.0, 0.42), (1.0, 0.42)), oval(0.0, 0.5, 0.72, 0.46, 10, 170))
    return [
        Part("wood", poly((-0.12, -1.0), (-0.03, -1.0), (-0.03, 0.45), (-0.12, 0.45))),
        Part("body", poly((0.0, -0.95), (0.86, 0.3), (0.0, 0.3))),
        Part("body", poly((-0.16, -0.7), (-0.16, 0.3), (-0.78, 0.3))),
        Part("trim", hull),
    ]


def house() -> list[Part]:
    panes = [Part("glass", poly((x, 0.1), (x + 0.3, 0.1), (x + 0.3, 0.44), (x, 0.44))) for x in (-0.54, 0.24)]
    return [
        Part("dark", poly((0.36, -0.9), (0.6, -0.9), (0.6, -0.3), (0.36, -0.3))),
        Part("body", poly((-0.74, -0.2), (0.74, -0.2), (0.74, 1.0), (-0.74, 1.0))),
        Part("trim", poly((-1.0, -0.1), (0, -1.0), (1.0, -0.1))),
        *panes,
        Part("wood", poly((-0.16, 0.45), (0.16, 0.45), (0.16, 1.0), (-0.16, 1.0))),
    ]


def mushroom() -> list[Part]:
    stem = join(poly((-0.26, 0.0), (0.26, 0.0)), oval(0, 0.85, 0.36, 0.15, 0, 180))
    return [
        Part("cream", stem),
        Part("body", join(oval(0, 0.02, 0.95, 0.88, 180, 360), oval(0, 0.02, 0.95, 0.2, 0, 180))),
    ]


def umbrella(grip: str) -> list[Part]:
    stick = [Part("dark", poly((-0.06, -1.0), (0.06, -1.0), (0.06, 0.85), (-0.06, 0.85)))]
    scallops = join(*[oval(0.96 - 0.32 - 0.64 * i, 0.02, 0.32, -0.16, 0, 180, points=12) for i in range(3)])
    canopy = join(oval(0, 0.02, 0.96, 0.84, 180, 360), scallops)
    return [*stick, *handle(grip, 0.18, 0.8, 0.25, 0.22, 0.1), Part("body", canopy)]


def bag(grip: str) -> list[Part]:
    sack = poly((-0.66, -0.2), (0.66, -0.2), (0.9, 0.9), (0.8, 1.0), (-0.8, 1.0), (-0.9, 0.9))
    return [
        *handle(grip, 0, -0.32, 0.48, 0.62, 0.15),
        Part("body", sack),
        Part("trim", poly((-0.7, -0.26), (0.7, -0.26), (0.72, 0.02), (0.14, 0.14), (-0.14, 0.14), (-0.72, 0.02))),
        Part("gold", oval(0, 0.12, 0.13, 0.13)),
    ]


def rocket() -> list[Part]:
    fins = [Part("trim", poly((s * 0.3, 0.2), (s * 0.82, 0.78), (s * 0.3, 0.7))) for s in (-1, 1)]
    body = join(poly((0.26, 0.7), (-0.26, 0.7)), oval(0, 0.1, 0.42, 1.1, 150, 390, power=1.6))
    return [
        Part("flame", poly((-0.26, 0.6), (0.26, 0.6), (0.0, 1.12))),
        Part("gold", poly((-0.13, 0.6), (0.13, 0.6), (0, 0.9))),
        *fins,
        Part("body", body),
        Part("trim", join(oval(0, 0.1, 0.42, 1.1, 222, 318, power=1.6))),
        Part("white", oval(0, -0.16, 0.24, 0.24)),
        Part("glass", oval(0, -0.16, 0.16, 0.16)),
    ]


GRIPPED: dict[str, Callable[[str], list[Part]]] = {"mug": mug, "teapot": teapot, "umbrella": umbrella, "bag": bag}
PLAIN: dict[str, Callable[[], list[Part]]] = {
    f.__name__: f for f in (fish, bird, cat, car, boat, house, mushroom, rocket)
}
# A scene draws its class by its place in this tuple: another order would change the picture of every seed.
CLASSES = (
    "mug",
    "teapot",
    "fish",
    "bird",
    "cat",
    "car",
    "boat",
    "house",
    "mushroom",
    "umbrella",
    "bag",
    "rocket",
)
# Where an emblem sits on the body, and its half size.
EMBLEM_SPOT = {
    "mug": (-0.12, 0.12, 0.34),
    "teapot": (0.0, 0.3, 0.36),
    "fish": (0.02, 0.12, 0.3),
    "bird": (0.22, 0.4, 0.26),
    "cat": (0.0, 0.5, 0.32),
    "car": (0.02, 0.22, 0.26),
    "boat": (0.26, -0.05, 0.24),
    "house": (0.0, -0.4, 0.26),
    "mushroom": (0.0, -0.4, 0.34),
    "umbrella": (0.0, -0.36, 0.32),
    "bag": (0.0, 0.58, 0.34),
    "rocket": (0.0, 0.3, 0.24),
}


@cache
def parts(name: str, grip: str = "round") -> list[Part]:
    """The polygons of a class, back to front; `grip` (one of HANDLES) is that of a class that has one."""
    return GRIPPED[name](grip) if name in GRIPPED else PLAIN[name]()


EMBLEMS = ("disc", "square", "triangle", "star", "cross", "heart", "ring", "crescent")


def emblem(kind: str) -> tuple[Outline, Outline | None]:
    """The polygon of an emblem within [-1, 1] x [-1, 1], and its hole."""
    if kind == "disc":
        return oval(0, 0, 0.95, 0.95), None
    if kind == "square":
        return poly((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)), None
    if kind == "triangle":
        return poly((0, -1.05), (1.05, 0.8), (-1.05, 0.8)), None
    if kind == "star":
        angle = np.radians(np.arange(10) * 36 - 90)
        radius = np.where(np.arange(10) % 2, 0.48, 1.15)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), None
    if kind == "cross":
        a, b = 0.36, 1.0
        return poly(
            (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)
        ), None
    if kind == "heart":
        return join(
            oval(-0.48, -0.3, 0.52, 0.5, 150, 360, points=14),
            oval(0.48, -0.3, 0.52, 0.5, 180, 390, points=14),
            poly((0, 1.05)),
        ), None
    if kind == "ring":
        return oval(0, 0, 1.0, 1.0), oval(0, 0, 0.5, 0.5)
    return join(oval(0, 0, 1.0, 1.0, 50, 310), oval(0.35, 0, 0.75, 0.75, 290, 70)), None
