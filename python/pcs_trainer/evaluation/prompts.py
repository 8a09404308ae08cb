"""Evaluation prompts: what is asked for, what a picture must then show, and the subject's words filled in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model.model import Model


@dataclass(frozen=True)
class Ask:
    """A prompt, {} for the subject, and what the picture then has to show, as the judge names it."""

    prompt: str
    kind: str  # of prompt: background, position, size, painting or light
    shows: tuple[tuple[str, str], ...] = ()


def _ask(prompt: str, kind: str, **shows: str) -> Ask:
    return Ask(prompt, kind, tuple(shows.items()))


# Twenty prompts of the embedded model's world; every word of them is one that the judge can read off the picture.
ASKS = (
    _ask("a photo of a {} in a studio", "background", background="studio"),
    _ask("a photo of a {} on a wooden table", "background", background="table"),
    _ask("a photo of a {} in a meadow", "background", background="meadow"),
    _ask("a photo of a {} on the beach", "background", background="beach"),
    _ask("a photo of a {} in the snow", "background", background="snow"),
    _ask("a photo of a {} at night", "background", background="night"),
    _ask("a photo of a {} in front of a brick wall", "background", background="brick"),
    _ask("a photo of a {} underwater", "background", background="underwater"),
    _ask("a {} on the left, on a wooden table", "position", position="left", background="table"),
    _ask("a photo of a {} in the snow on the left", "position", position="left", background="snow"),
    _ask("a {} on the beach on the right", "position", position="right", background="beach"),
    _ask("a photo of a {} in front of a brick wall, on the right", "position", position="right", background="brick"),
    _ask("a small {} in a meadow", "size", scale="small", background="meadow"),
    _ask("a very small {} at night", "size", scale="small", background="night"),
    _ask("a close up of a {} underwater", "size", scale="large", background="underwater"),
    _ask("a painting of a {} in the snow", "painting", style="painting", background="snow"),
    _ask("a painting of a {} in a meadow", "painting", style="painting", background="meadow"),
    _ask("a painting of a {} on a table", "painting", style="painting", background="table"),
    _ask("a photo of a {} in a meadow at sunset", "light", light="sunset", background="meadow"),
    _ask("a photo of a {} on the beach in dim light", "light", light="dim", background="beach"),
)

# For other models, where the user gives none.
PROMPTS = (
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
    "a {} in a forest",
    "a {} on a kitchen table",
    "a {} in front of a city at night",
    "a {} on a red carpet",
    "a {} under water",
    "a {} on top of a mountain",
    "an oil painting of a {}",
    "a pencil drawing of a {}",
    "a {} seen from above",
    "a close up of a {}",
)


PLACES = (
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "on top of a purple rug in a forest",
)
OBJECT_PLACES = (
    "with a wheat field in the background",
    "with a tree and autumn leaves in the background",
    "with the Eiffel Tower in the background",
    "floating on top of water",
    "floating in an ocean of milk",
    "on top of green grass with sunflowers around it",
    "on top of a mirror",
    "on top of the sidewalk in a crowded street",
    "on top of a dirt road",
    "on top of a white rug",
)
OUTFITS = (
    "wearing a red hat",
    "wearing a santa hat",
    "wearing a rainbow scarf",
    "wearing a black top hat and a monocle",
    "in a chef outfit",
    "in a firefighter outfit",
    "in a police outfit",
    "wearing pink glasses",
    "wearing a yellow shirt",
    "in a purple wizard outfit",
)
LOOKS = ("a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}")
# DreamBench (arXiv 2208.12242, supplement): 25 prompts for things, 25 for animals.
SETS = {
    "dreambench-object": (*(f"a {{}} {where}" for where in (*PLACES, *OBJECT_PLACES)), *LOOKS),
    "dreambench-live": (*(f"a {{}} {where}" for where in (*PLACES, *OUTFITS)), *LOOKS),
}


def asks_for(model: Model, prompts: Sequence[str | Ask] | None = None) -> list[Ask]:
    """The prompts to evaluate with: the user's, or the model's own set.

    Args:
        model: the embedded model has ASKS, every other PROMPTS.
        prompts: with {} for the subject; default: the model's own set.
    """
    given = prompts or (ASKS if model.embedded else PROMPTS)
    asks = [a if isinstance(a, Ask) else Ask(a, "given") for a in given]
    for ask in asks:
        if "{}" not in ask.prompt:
            raise ValueError(f"the prompt {ask.prompt!r} must hold {{}} where the subject's words go")
    return asks


def filled(prompt: str, words: str) -> str:
    """The prompt with the subject's words in place of {}, and "an" before a vowel."""
    text = prompt.replace("{}", words)
    return re.sub(r"\ba (?=[aeiou])", "an ", text) if words[:1] in "aeiou" else text


def photo_of_class(class_word: str) -> str:
    """The prompt by which class drift is measured, whatever class prompt a concept was trained with."""
    return filled("a photo of a {}", class_word)
