"""The tiny world: scenes with known truth, drawn as 64x64 pictures with Pillow and numpy.

`scene(seed)` -> Scene, `render(scene)` -> uint8 [64, 64, 3]; both depend on nothing but their arguments. The numbers in
here are part of the world that the embedded model knows: changed, its weights no longer fit. Letters: H, W pixels.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .backgrounds import BACKGROUNDS, SUPERSAMPLE, background
from .shapes import CLASSES, EMBLEM_SPOT, ROLE_COLOURS, emblem, parts
from .surface import PATTERNS, Grid, pattern, shading

__all__ = [
    "BACKGROUNDS",
    "CLASSES",
    "COLOURS",
    "PATTERNS",
    "POSITIONS",
    "SIZE",
    "Look",
    "Scene",
    "is_held_out",
    "render",
    "scene",
]

Colour: TypeAlias = tuple[float, ...]  # red, green, blue, each 0 to 255
Pixels: TypeAlias = NDArray[np.floating]  # [H, W, 3], each 0 to 255
Mask: TypeAlias = NDArray[np.floating]  # [H, W], each 0 to 1

SIZE = 64
COLOURS = {
    "red": (212, 34, 38),
    "orange": (246, 126, 20),
    "yellow": (248, 212, 36),
    "green": (22, 142, 62),
    "blue": (34, 84, 214),
    "purple": (112, 40, 176),
    "pink": (255, 120, 190),
    "white": (244, 244, 242),
}
POSITIONS = ("left", "middle", "right")
LIGHTS = ("normal", "sunset", "dim")
STYLES = ("photo", "painting")
# An object's width as a share of the picture; the gaps between the sizes keep each one apart from the next.
SCALES = {"small": (0.44, 0.52), "medium": (0.58, 0.68), "large": (0.82, 0.94)}
CENTRES = {"left": 0.30, "middle": 0.5, "right": 0.70}
SECOND_TONE = {"white": (70, 74, 92)}
LIGHT_TINT = {"normal": (1.0, 1.0, 1.0), "sunset": (1.1, 0.84, 0.62), "dim": (0.6, 0.62, 0.72)}


@dataclass(frozen=True)
class Look:
    """The appearance of one object: what a caption cannot say belongs here."""

    main: Colour
    second: Colour
    pattern: str
    turn: int = 0
    trim: Colour | None = None
    grip: str = "round"
    stretch: tuple[float, float] = (1.0, 1.0)
    emblem: str | None = None
    emblem_colour: Colour = (255, 255, 255)


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture; `colour` and `pattern` are None for a subject."""

    kind: str
    colour: str | None
    pattern: str | None
    background: str
    position: str
    scale: str
    light: str
    style: str
    look: Look
    x: float
    y: float
    size: float
    angle: float
    mirrored: bool
    side: int
    seed: int


def is_held_out(kind: str, colour: str, place: str) -> bool:
    """Whether a triple of class, colour and background is kept from training as a whole (about one in twelve)."""
    return zlib.crc32(f"{kind}/{colour}/{place}".encode()) % 12 == 0


def _pose(rng: np.random.Generator, position: str, scale: str) -> dict[str, Any]:
    size = rng.uniform(*SCALES[scale])
    x = CENTRES[position] + rng.uniform(-0.035, 0.035)
    y = 0.93 - size / 2 - rng.uniform(0.0, 0.10) * (1 - size)
    return {
        "x": x,
        "y": y,
        "size": size,
        "angle": rng.normal(0, 5.0),
        "mirrored": bool(rng.integers(2)),
        "side": int(rng.choice((-1, 1))),
    }


def _pick(rng: np.random.Generator, options: Sequence[str], weights: Sequence[float] | None = None) -> str:
    return str(rng.choice(options, p=weights))


def scene(seed: int, held_out: bool | None = None, **fixed: str) -> Scene:
    """A random scene.

    Args:
        seed: what the scene follows from, as does its picture.
        held_out: True draws only triples that are kept from training, False only the others, None any.
        fixed: values of fields (kind, colour, pattern, background, position, scale, light, style).
    """
    rng = np.random.default_rng(seed)
    while True:
        kind = fixed.get("kind") or _pick(rng, CLASSES)
        colour = fixed.get("colour") or _pick(rng, list(COLOURS))
        place = fixed.get("background") or _pick(rng, BACKGROUNDS)
        if held_out is None or is_held_out(kind, colour, place) == held_out:
            break
    scale = fixed.get("scale") or _pick(rng, list(SCALES), (0.2, 0.55, 0.25))
    position = fixed.get("position") or ("middle" if scale == "large" else _pick(rng, POSITIONS))
    kind_of_pattern = fixed.get("pattern") or _pick(rng, PATTERNS, (0.4, 0.2, 0.2, 0.2))
    main = np.clip(np.array(COLOURS[colour]) + rng.integers(-8, 9, 3) + rng.integers(-8, 5), 0, 255)
    second = SECOND_TONE.get(colour, (250, 246, 232))
    look = Look(
        tuple(int(c) for c in main),
        second,
        kind_of_pattern,
        int(rng.integers(2)),
        stretch=(rng.uniform(0.94, 1.06), rng.uniform(0.94, 1.06)),
    )
    return Scene(
        kind,
        colour,
        kind_of_pattern,
        place,
        position,
        scale,
        fixed.get("light") or _pick(rng, LIGHTS, (0.76, 0.12, 0.12)),
        fixed.get("style") or _pick(rng, STYLES, (0.85, 0.15)),
        look,
        seed=int(seed),
        **_pose(rng, position, scale),
    )


def with_look(base: Scene, look: Look) -> Scene:
    """The same scene with an object that has no name for its colour and pattern."""
    return replace(base, look=look, colour=None, pattern=None)


def _to_picture(points: NDArray[np.float64], s: Scene, size: int) -> NDArray[np.float64]:
    """Object space to canvas pixels."""
    p = np.asarray(points) * np.array(s.look.stretch)
    if s.mirrored:
        p = p * np.array([-1.0, 1.0])
    angle = np.radians(s.angle)
    cos, sin = np.cos(angle), np.sin(angle)
    x = p[:, 0] * cos - p[:, 1] * sin
    y = p[:, 0] * sin + p[:, 1] * cos
    return np.stack([s.x * size + x * s.size * size / 2, s.y * size + y * s.size * size / 2], 1)


def _object_coordinates(s: Scene, size: int) -> tuple[Grid, Grid]:
    """Object-space (u, v) of every pixel centre: the inverse of _to_picture."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = (grid[None, :] - s.x) * 2 / s.size, (grid[:, None] - s.y) * 2 / s.size
    angle = np.radians(s.angle)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = x * cos + y * sin, y * cos - x * sin
    if s.mirrored:
        u = -u
    return u / np.float32(s.look.stretch[0]), v / np.float32(s.look.stretch[1])


def _mask(points: NDArray[np.float64], hole: NDArray[np.float64] | None, s: Scene, size: int) -> Mask:
    """Coverage in [0, 1] of a polygon given in object space."""
    big = size * SUPERSAMPLE
    canvas = Image.new("L", (big, big))
    draw = ImageDraw.Draw(canvas)
    draw.polygon([tuple(p) for p in _to_picture(points, s, big)], fill=255)
    if hole is not None:
        draw.polygon([tuple(p) for p in _to_picture(hole, s, big)], fill=0)
    return np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32) / 255


def _blurred(mask: Mask, radius: float) -> Mask:
    image = Image.fromarray(np.rint(mask * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.BoxBlur(radius)), dtype=np.float32) / 255


def _body_colours(s: Scene, u: Grid, v: Grid, flat: bool) -> tuple[Pixels, Pixels]:
    """The patterned, shaded colour of the body and the darker colour of the trim, each [H, W, 3]."""
    look = s.look
    mix = pattern(look.pattern, u, v, np.float32(2 / (s.size * len(u))), look.turn)[..., None]
    body = np.array(look.main, np.float32) * (1 - mix) + np.array(look.second, np.float32) * mix
    trim = np.array(look.trim or [c * 0.66 for c in look.main], np.float32)
    glow, highlight = shading(u, v, -s.side if s.mirrored else s.side)
    if flat:
        glow, highlight = 0.5 + 0.5 * glow, 0.0 * highlight
    glow, highlight = glow[..., None], highlight[..., None]
    return body * glow * (1 - highlight) + 255 * highlight, trim * glow


def _paint_object(picture: Pixels, s: Scene, size: int) -> Pixels:
    """The object over the picture: shadow, soft contour, then the parts back to front."""
    flat = s.style == "painting"
    u, v = _object_coordinates(s, size)
    body, trim = _body_colours(s, u, v, flat)
    layers, union = [], np.zeros((size, size), np.float32)
    for part in parts(s.kind, s.look.grip):
        mask = _mask(part.outline, part.hole, s, size)
        fill = {"body": body, "trim": trim}.get(part.role)
        layers.append((mask, np.array(ROLE_COLOURS[part.role], np.float32) if fill is None else fill))
        union = np.maximum(union, mask)
    if s.look.emblem:
        cx, cy, half = EMBLEM_SPOT[s.kind]
        shape, hole = emblem(s.look.emblem)
        place = np.array([cx, cy])
        mask = _mask(shape * half + place, None if hole is None else hole * half + place, s, size)
        layers.append((mask, np.array(s.look.emblem_colour, np.float32)))
    contour = np.clip(_blurred(union, size / 64) * (3.0 if flat else 2.2), 0, 1)[..., None] * (0.92 if flat else 0.55)
    picture = picture * (1 - contour) + np.float32(24) * contour
    for mask, colour in layers:
        picture += mask[..., None] * (colour - picture)
    if not flat:
        rim = union * (1 - np.clip(_blurred(union, 3 * size / 64) * 2 - 0.9, 0, 1))
        picture *= (1 - 0.22 * rim)[..., None]
    return picture


def _shadow(picture: Pixels, s: Scene, size: int) -> Pixels:
    """A soft dark ellipse on the ground, away from the light."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x = (grid[None, :] - s.x + s.side * 0.1 * s.size) / (0.56 * s.size)
    y = (grid[:, None] - s.y - 0.47 * s.size) / (0.13 * s.size)
    dark = 0.5 * np.clip(1.35 - (x * x + y * y), 0, 1)
    return picture * (1 - dark[..., None])


def render(s: Scene, size: int = SIZE) -> NDArray[np.uint8]:
    """The picture of a scene, uint8 [size, size, 3]."""
    rng = np.random.default_rng([s.seed & 0xFFFFFFFF, 7])
    picture = background(s.background, rng, size)
    picture = picture * np.array(LIGHT_TINT[s.light], np.float32)
    picture = _paint_object(_shadow(picture, s, size), _in_its_light(s), size)
    if s.style == "painting":
        picture = _on_paper(picture, size)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _in_its_light(s: Scene) -> Scene:
    """The scene with the tint of its light laid on the object, weaker than on the place so that colours stay true."""
    if s.light == "normal":
        return s
    tint = 0.65 + 0.35 * np.array(LIGHT_TINT[s.light])

    def lit(colour: Colour) -> Colour:
        return tuple(float(min(255, c * t)) for c, t in zip(colour, tint, strict=True))

    look = s.look
    return replace(
        s,
        look=replace(
            look,
            main=lit(look.main),
            second=lit(look.second),
            trim=look.trim and lit(look.trim),
            emblem_colour=lit(look.emblem_colour),
        ),
    )


def _on_paper(picture: Pixels, size: int) -> Pixels:
    """The look of a painting: stronger colour in flat steps, and a margin of paper."""
    mean = picture.mean(-1, keepdims=True)
    picture = np.clip(mean + (picture - mean) * 1.25, 0, 255)
    picture = picture * ((np.rint(mean / 32) * 32 + 6) / (mean + 6))
    grid = np.abs(np.arange(size) + 0.5 - size / 2) / (size / 2)
    margin = np.clip((np.maximum(grid[None, :], grid[:, None]) - 0.89) * size / 4, 0, 1)[..., None]
    return picture * (1 - margin) + np.array([248, 242, 226], np.float32) * margin
