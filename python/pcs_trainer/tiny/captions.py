"""Natural captions of scenes: synonyms, other orders, things left unsaid.

`caption(scene, rng)` says a random part of the truth and reports which fields it named. How often each part is said is
part of what the embedded model was trained on.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .world import Scene

WORDS = {
    "mug": ("mug", "cup"),
    "teapot": ("teapot", "kettle"),
    "fish": ("fish",),
    "bird": ("bird",),
    "cat": ("cat", "kitten"),
    "car": ("car",),
    "boat": ("boat", "sailboat"),
    "house": ("house", "cottage"),
    "mushroom": ("mushroom", "toadstool"),
    "umbrella": ("umbrella", "parasol"),
    "bag": ("bag", "handbag"),
    "rocket": ("rocket", "spaceship"),
    "red": ("red", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy"),
    "white": ("white",),
    "plain": ("plain",),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "polka dot"),
    "checkered": ("checkered", "chequered"),
}
AFTERWARDS = {"striped": "with stripes", "dotted": "with dots", "checkered": "with a check pattern"}
PLACES = {
    "studio": ("in a studio", "in front of a grey backdrop"),
    "table": ("on a wooden table", "on a table"),
    "meadow": ("in a meadow", "on the grass", "in a green field"),
    "beach": ("on the beach", "on the sand", "by the sea"),
    "snow": ("in the snow", "in front of snowy mountains"),
    "night": ("at night", "under the moon", "under the stars"),
    "brick": ("in front of a brick wall", "by a brick wall"),
    "underwater": ("underwater", "under the sea", "at the bottom of the sea"),
}
WHERE = {
    "left": ("on the left", "on the left side"),
    "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "on the right side"),
}
LIGHT = {
    "sunset": ("at sunset", "in warm evening light"),
    "dim": ("in dim light", "in the shade"),
    "normal": ("in daylight",),
}
DAYLIT = ("meadow", "beach", "snow", "brick")
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("big", "large", "huge")}
FRAMES = {"small": ("a far away", "a very small"), "large": ("a close up of a", "a zoomed in")}
DECORATED = ("patterned", "decorated", "fancy")


@dataclass(frozen=True)
class Caption:
    """The words, and the fields of the scene that they name."""

    text: str
    names: frozenset[str]


def _one(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _article(phrase: str) -> str:
    first = phrase.split()[0]
    return f"{'an' if first[0] in 'aeiou' and first != 'one' else 'a'} {phrase}"


def is_reserved(text: str) -> bool:
    """Whether a caption is kept for testing: one in sixteen, decided by its own letters."""
    return zlib.crc32(text.encode()) % 16 == 3


def bare(scene: Scene, rng: np.random.Generator) -> Caption:
    """One of the shortest captions: "a mug", "a blue fish", "a small blue fish"."""
    noun = _one(rng, WORDS[scene.kind])
    words, names = [], {"kind"}
    if scene.scale in SIZE_WORDS and rng.random() < 0.6:
        words.append(_one(rng, SIZE_WORDS[scene.scale]))
        names.add("scale")
    if scene.colour and rng.random() < 0.6:
        words.append(_one(rng, WORDS[scene.colour]))
        names.add("colour")
    if scene.pattern and scene.pattern != "plain" and rng.random() < 0.9:
        words.append(_one(rng, WORDS[scene.pattern]))
        names.add("pattern")
    return Caption(_article(" ".join([*words, noun])), frozenset(names))


def _subject_phrase(scene: Scene, rng: np.random.Generator, names: set[str]) -> str:
    """Article, size, colour, pattern and noun; what is said goes into `names`."""
    words: list[str] = []
    tail, frame = "", None
    if scene.scale in FRAMES and rng.random() < 0.65:
        names.add("scale")
        if rng.random() < 0.4:
            frame = _one(rng, FRAMES[scene.scale])
        else:
            words.append(_one(rng, SIZE_WORDS[scene.scale]))
    if scene.colour and rng.random() < 0.92:
        words.append(_one(rng, WORDS[scene.colour]))
        names.add("colour")
    if scene.pattern and rng.random() < (0.93 if scene.pattern != "plain" else 0.3):
        names.add("pattern")
        if scene.pattern in AFTERWARDS and rng.random() < 0.3:
            tail = " " + AFTERWARDS[scene.pattern]
        else:
            last = len(words) if rng.random() < 0.7 or frame else max(0, len(words) - 1)
            words.insert(last, _one(rng, WORDS[scene.pattern]))
    phrase = " ".join([*words, _one(rng, WORDS[scene.kind])]) + tail
    return f"{frame} {phrase}" if frame else _article(phrase)


def caption(scene: Scene, rng: np.random.Generator, full: bool = False) -> Caption:
    """A caption of the scene; `full` always names the background and, where the scene is not large, the position."""
    names = {"kind"}
    phrase = _subject_phrase(scene, rng, names)
    if scene.style == "painting":
        either = rng.random() < 0.3
        phrase = f"{_one(rng, ('a painting of', 'a picture of')) if either else 'a painting of'} {phrase}"
    elif rng.random() < 0.5:
        phrase = f"a photo of {phrase}"
    details = []
    if full or rng.random() < 0.93:
        details.append(_one(rng, PLACES[scene.background]))
        names.add("background")
    if scene.scale != "large" and (full or rng.random() < 0.75):
        details.append(_one(rng, WHERE[scene.position]))
        names.add("position")
    if rng.random() < (0.8 if scene.light != "normal" else 0.15 * (scene.background in DAYLIT)):
        details.append(_one(rng, LIGHT[scene.light]))
        names.add("light")
    if len(details) > 1 and rng.random() < 0.25:
        details = details[1:] + details[:1]
    if "position" in names and rng.random() < 0.15:
        words = next(d for d in details if d in WHERE[scene.position])
        details.remove(words)
        phrase = f"{words}, {phrase}"
    text = phrase + "".join(f"{', ' if i or rng.random() < 0.15 else ' '}{d}" for i, d in enumerate(details))
    return Caption(text, frozenset(names))


def decorated(scene: Scene, rng: np.random.Generator) -> Caption:
    """A caption of an object whose look has no name: "a patterned mug on the beach"."""
    said = caption(scene, rng)
    noun = next(w for w in WORDS[scene.kind] if f" {w}" in f" {said.text}")
    text = said.text
    for article in (f"an {noun}", f"a {noun}", noun):
        if article in text:
            word = _one(rng, DECORATED)
            named = f"a {word} {noun}" if article != noun else f"{word} {noun}"
            return Caption(text.replace(article, named, 1), said.names)
    return said


def training_caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """A caption that the model reads in training: never a reserved one, one in ten bare."""
    while True:
        if scene.colour is None:
            said = decorated(scene, rng) if rng.random() < 0.75 else caption(scene, rng)
        else:
            said = bare(scene, rng) if rng.random() < 0.1 else caption(scene, rng)
        if not (is_reserved(said.text) and {"colour", "background"} <= said.names):
            return said


def test_caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """A caption that training never uses: reserved, and naming class, colour and background."""
    while True:
        said = caption(scene, rng, full=True)
        if is_reserved(said.text) and {"colour", "background"} <= said.names:
            return said
