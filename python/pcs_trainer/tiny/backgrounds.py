"""The places of the tiny world, drawn with Pillow polygons at four times the size and averaged down.

Each place is a function of (random generator, drawing pen, canvas size); positions are fractions of the picture, from
the top left. They are part of the world that the embedded model knows: changed, its weights no longer fit.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

RGB: TypeAlias = tuple[int, ...]
Pen: TypeAlias = ImageDraw.ImageDraw
Rng: TypeAlias = np.random.Generator

SUPERSAMPLE = 4  # pixels a side drawn for one of the picture: Pillow's polygons are not anti-aliased


def blend(a: RGB, b: RGB, t: float) -> RGB:
    """The colour at `t` of the way from a to b."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))


def gradient(draw: Pen, size: int, y0: float, y1: float, top: RGB, bottom: RGB, bands: int = 24) -> None:
    """A vertical colour gradient between two heights given as fractions of the picture."""
    edges = np.linspace(y0 * size, y1 * size, bands + 1)
    for i in range(bands):
        colour = blend(top, bottom, (i + 0.5) / bands)
        draw.rectangle([0, edges[i], size, edges[i + 1] + 1], fill=colour)


def vary(rng: Rng, colour: RGB, amount: int = 10) -> RGB:
    """The same colour under another sky."""
    shift = rng.integers(-amount, amount + 1)
    return tuple(int(np.clip(c + shift + rng.integers(-4, 5), 0, 255)) for c in colour)


def disc(draw: Pen, size: int, x: float, y: float, rx: float, ry: float, fill: RGB) -> None:
    """A filled ellipse."""
    draw.ellipse([(x - rx) * size, (y - ry) * size, (x + rx) * size, (y + ry) * size], fill=fill)


def hills(draw: Pen, size: int, rng: Rng, base: float, height: float, colour: RGB, count: int = 2) -> None:
    """A rolling skyline reaching down to the bottom."""
    x = np.linspace(0, 1, 25)
    y = base - height * 0.5 * (1 + np.sin(x * np.pi * count + rng.uniform(0, 6.28)))
    draw.polygon([(0, size), *[(a * size, b * size) for a, b in zip(x, y, strict=True)], (size, size)], fill=colour)


def cloud(draw: Pen, size: int, x: float, y: float, r: float, colour: RGB) -> None:
    """A cloud of four discs."""
    for dx, dy, k in ((-1.3, 0.2, 0.7), (0, -0.15, 1.0), (1.3, 0.2, 0.75), (0.2, 0.35, 0.9)):
        disc(draw, size, x + dx * r, y + dy * r, k * r * 1.2, k * r * 0.75, colour)


def studio(rng: Rng, draw: Pen, size: int) -> None:
    tone = vary(rng, (126, 138, 150), 14)
    gradient(draw, size, 0, 0.66, blend(tone, (0, 0, 0), 0.22), blend(tone, (255, 255, 255), 0.25))
    gradient(draw, size, 0.66, 1, blend(tone, (255, 255, 255), 0.32), blend(tone, (255, 255, 255), 0.05))


def table(rng: Rng, draw: Pen, size: int) -> None:
    wall = vary(rng, (226, 214, 190), 8)
    wood = vary(rng, (156, 98, 52), 10)
    line = 0.6 + rng.uniform(-0.04, 0.04)
    gradient(draw, size, 0, line, blend(wall, (255, 255, 255), 0.15), blend(wall, (120, 90, 60), 0.12))
    gradient(draw, size, line, 1, blend(wood, (255, 220, 170), 0.2), wood)
    draw.rectangle([0, line * size, size, (line + 0.025) * size], fill=blend(wood, (0, 0, 0), 0.45))
    vanish = rng.uniform(0.35, 0.65)
    for k in range(-4, 6):
        top, bottom = vanish + (k - 0.5) * 0.14, vanish + (k - 0.5) * 0.34
        draw.polygon(
            [
                (top * size, (line + 0.025) * size),
                ((top + 0.012) * size, (line + 0.025) * size),
                ((bottom + 0.035) * size, size),
                (bottom * size, size),
            ],
            fill=blend(wood, (0, 0, 0), 0.35),
        )


def meadow(rng: Rng, draw: Pen, size: int) -> None:
    sky, grass = vary(rng, (110, 186, 240), 10), vary(rng, (124, 196, 68), 10)
    line = 0.56 + rng.uniform(-0.04, 0.04)
    gradient(draw, size, 0, line, sky, blend(sky, (255, 255, 255), 0.6))
    for _ in range(rng.integers(1, 3)):
        cloud(draw, size, rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.26), rng.uniform(0.06, 0.09), (255, 255, 255))
    hills(draw, size, rng, line + 0.03, 0.1, blend(grass, (20, 90, 60), 0.35))
    gradient(draw, size, line + 0.03, 1, grass, blend(grass, (20, 80, 30), 0.4))
    for _ in range(10):
        x, y = rng.uniform(0, 1), rng.uniform(line + 0.12, 0.98)
        draw.polygon(
            [((x - 0.03) * size, y * size), (x * size, (y - 0.07) * size), ((x + 0.03) * size, y * size)],
            fill=blend(grass, (16, 80, 30), 0.55),
        )


def beach(rng: Rng, draw: Pen, size: int) -> None:
    sky, sea, sand = vary(rng, (150, 214, 250), 8), vary(rng, (20, 150, 190), 8), vary(rng, (244, 218, 160), 8)
    line = 0.4 + rng.uniform(-0.03, 0.03)
    gradient(draw, size, 0, line, sky, blend(sky, (255, 255, 255), 0.6))
    disc(draw, size, rng.uniform(0.1, 0.9), 0.14, 0.08, 0.08, (255, 244, 170))
    gradient(draw, size, line, line + 0.24, blend(sea, (0, 40, 90), 0.35), blend(sea, (150, 240, 230), 0.3))
    x = np.linspace(0, 1, 25)
    y = line + 0.21 + 0.02 * np.sin(x * 9 + rng.uniform(0, 6.28))
    for lift, colour in ((0.0, (250, 252, 250)), (0.045, sand)):
        draw.polygon(
            [(0, size), *[(a * size, (b + lift) * size) for a, b in zip(x, y, strict=True)], (size, size)], fill=colour
        )
    gradient(draw, size, line + 0.32, 1, sand, blend(sand, (190, 140, 80), 0.35))


def snow(rng: Rng, draw: Pen, size: int) -> None:
    sky, ice = vary(rng, (176, 196, 222), 8), vary(rng, (238, 244, 252), 4)
    line = 0.56 + rng.uniform(-0.03, 0.03)
    gradient(draw, size, 0, line, sky, blend(sky, (255, 255, 255), 0.5))
    for _ in range(3):
        x, w, h = rng.uniform(0, 1), rng.uniform(0.2, 0.32), rng.uniform(0.24, 0.38)
        draw.polygon(
            [((x - w) * size, line * size), (x * size, (line - h) * size), ((x + w) * size, line * size)],
            fill=(112, 134, 168),
        )
        draw.polygon(
            [
                ((x - w * 0.36) * size, (line - h * 0.64) * size),
                (x * size, (line - h) * size),
                ((x + w * 0.36) * size, (line - h * 0.64) * size),
            ],
            fill=(248, 250, 255),
        )
    hills(draw, size, rng, line + 0.04, 0.06, ice)
    gradient(draw, size, line + 0.05, 1, ice, blend(ice, (140, 170, 220), 0.4))


def night(rng: Rng, draw: Pen, size: int) -> None:
    sky = vary(rng, (16, 20, 58), 5)
    line = 0.66 + rng.uniform(-0.03, 0.03)
    gradient(draw, size, 0, line, sky, blend(sky, (70, 60, 140), 0.55))
    for _ in range(16):
        disc(draw, size, rng.uniform(0, 1), rng.uniform(0, line - 0.06), 0.011, 0.011, (255, 250, 220))
    x = rng.uniform(0.12, 0.88)
    disc(draw, size, x, 0.16, 0.09, 0.09, (252, 242, 190))
    disc(draw, size, x + 0.05, 0.14, 0.075, 0.075, blend(sky, (70, 60, 140), 0.12))
    hills(draw, size, rng, line + 0.03, 0.1, (18, 30, 50))
    gradient(draw, size, line + 0.03, 1, (34, 48, 74), (14, 20, 38))


def brick(rng: Rng, draw: Pen, size: int) -> None:
    clay, mortar = vary(rng, (168, 84, 66), 8), (214, 196, 180)
    line = 0.72 + rng.uniform(-0.03, 0.02)
    draw.rectangle([0, 0, size, size], fill=mortar)
    height, width = 0.12, 0.26
    offset = rng.uniform(0, width)
    for row in range(7):
        for column in range(-2, 6):
            x, y = column * width + offset * 0.5 + (row % 2) * width / 2, line - (row + 1) * height
            draw.rectangle(
                [(x + 0.013) * size, (y + 0.013) * size, (x + width - 0.013) * size, (y + height - 0.013) * size],
                fill=blend(clay, (110, 44, 36), 0.5 * ((row * 3 + column * 5) % 4) / 3),
            )
    gradient(draw, size, line, 1, (140, 140, 146), (112, 112, 120))
    draw.rectangle([0, line * size, size, (line + 0.03) * size], fill=(86, 86, 94))


def underwater(rng: Rng, draw: Pen, size: int) -> None:
    water = vary(rng, (0, 126, 168), 8)
    line = 0.76 + rng.uniform(-0.03, 0.03)
    gradient(draw, size, 0, 1, blend(water, (120, 240, 240), 0.45), blend(water, (0, 20, 70), 0.6))
    x = rng.uniform(-0.1, 0.4)
    for k in range(3):
        a = x + 0.33 * k
        draw.polygon(
            [(a * size, 0), ((a + 0.1) * size, 0), ((a + 0.02) * size, 0.8 * size), ((a - 0.14) * size, 0.8 * size)],
            fill=blend(water, (150, 245, 245), 0.32),
        )
    hills(draw, size, rng, line + 0.05, 0.07, (88, 140, 130))
    for _ in range(2):
        a, h = rng.choice([rng.uniform(0.02, 0.25), rng.uniform(0.75, 0.98)]), rng.uniform(0.25, 0.4)
        y = np.linspace(1, 1 - h, 12)
        sway = a + 0.03 * np.sin(y * 22 + rng.uniform(0, 6.28))
        draw.line([(p * size, q * size) for p, q in zip(sway, y, strict=True)], fill=(20, 110, 70), width=size // 24)
    for _ in range(5):
        a, b, r = rng.uniform(0, 1), rng.uniform(0.05, 0.7), rng.uniform(0.015, 0.03)
        disc(draw, size, a, b, r, r, (200, 246, 250))


PLACES: dict[str, Callable[[Rng, Pen, int], None]] = {
    f.__name__: f for f in (studio, table, meadow, beach, snow, night, brick, underwater)
}
BACKGROUNDS = tuple(PLACES)


def background(name: str, rng: Rng, size: int) -> NDArray[np.float32]:
    """The picture of a place, [size, size, 3] in [0, 255]."""
    big = Image.new("RGB", (size * SUPERSAMPLE, size * SUPERSAMPLE))
    PLACES[name](rng, ImageDraw.Draw(big), size * SUPERSAMPLE)
    return np.asarray(big.reduce(SUPERSAMPLE), dtype=np.float32)
