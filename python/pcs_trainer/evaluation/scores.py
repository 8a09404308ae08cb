"""How good a concept is: is the subject drawn, is the prompt followed, what has become of what the model knew.

    evaluate(model, concept, photos)          by drawing; the embedded model's judge reads the pictures
    evaluate_folder(pictures, photos, prompts, ...)   pictures that are there already

For real checkpoints the eyes are CLIP and DINO from folders on this machine: CLIP-T is `text_similarity`, CLIP-I is
`image_similarity`, DINO is `subject_similarity`, and `kid` is the kernel distance on DINO's (or CLIP's) features.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..data.pictures import load_pictures
from ..sampling.lag import Lag
from .image_encoders import JudgeEyes, NetworkEyes, Pictures, kid, mean_cosine, mean_other_cosine

if TYPE_CHECKING:
    from ..concept.concept import Concept
    from ..model.model import Model

Eyes = JudgeEyes | NetworkEyes


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

# For other models, where the user names none.
PROMPTS = (
    "a photo of a {} on the beach", "a photo of a {} in the snow", "a {} in a forest", "a {} on a kitchen table",
    "a {} in front of a city at night", "a {} on a red carpet", "a {} under water", "a {} on top of a mountain",
    "an oil painting of a {}", "a pencil drawing of a {}", "a {} seen from above", "a close up of a {}",
)  # fmt: skip


class Scores(dict):
    """Name -> number; as text, one line each."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name.replace('_', ' '):<{width}}  {value:g}" for name, value in rounded(self).items())

    def asdict(self) -> dict[str, float]:
        return dict(self)


def rounded(found: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in found.items()}


@dataclass
class Base:
    """What the base model draws of a class: the measure that a concept is held against."""

    class_word: str
    plain: list[np.ndarray]  # of "a photo of a [class]"
    asked: list[np.ndarray]  # of every prompt
    prompts: list[str] = field(default_factory=list)


def evaluate(
    model: Model,
    concept: Concept,
    photos: Any,
    *,
    prompts: Sequence[str | Ask] | None = None,
    count: int = 8,
    steps: int = 25,
    guidance: float | None = None,
    seed: int = 0,
    lag: bool | Lag = False,
    clip: str | Path | None = None,
    dino: str | Path | None = None,
    base: Base | None = None,
    eyes: Eyes | None = None,
    draw: Callable[..., list[np.ndarray]] | None = None,
) -> Scores:
    """Draw with a concept, and with the base model beside it, and measure both.

    photos: real pictures of the subject, others than it was learned from: a folder or a list. prompts: with {} for
    the subject. count: pictures of the subject's own prompt, and of its class. clip, dino: folders of networks, for
    every model but the embedded one, which has its judge. base: what base_of(...) drew, to draw it once for many.
    draw(prompts, concepts, **options) -> pictures takes the place of sample().

    subject_similarity      of the drawn subject to the photos; beside it _base (the class by the base model) and
                            _real (the photos among themselves); gap_closed = (it - base) / (real - base)
    prompted_similarity     the same in the pictures of `prompts`
    prompt_accuracy         share of what the prompts ask for that the judge finds; prompt_kept: over the base model's
    text_similarity         of pictures to their prompts, the subject's own word left out
    diversity               mean distance between pictures of one prompt
    drift_to_subject        how far "a photo of a [class]" has moved towards the subject, as a share of the same gap
    drift_distance          kernel distance between the class's pictures before and after
    class_accuracy          share of the class's pictures after that show the class; beside it _base
    """
    started = time.monotonic()
    eyes = eyes or _eyes(model, clip, dino)
    asks = [a if isinstance(a, Ask) else Ask(a, "given") for a in prompts or _own_prompts(model)]
    _check_prompts(asks)
    draw = draw or _drawer(model, steps, guidance, seed)
    base = base or base_of(model, concept.class_word, asks=asks, count=count, draw=draw)
    real = [p.pixels for p in load_pictures(photos).pictures]
    name = " ".join(filter(None, (concept.token, concept.class_word)))
    masked: dict[str, Any] = {"lag": lag} if lag else {}
    subject = draw([concept.instance_prompt] * count, [concept], **masked)
    asked = draw([filled(a.prompt, name) for a in asks], [concept], **masked)
    plain = draw([class_prompt(base.class_word)] * count, [concept])  # the words that LAG looks for are not in it
    found = similarities(eyes, subject, real, base.plain) | _in_prompts(eyes, asks, asked, real, base)
    found |= _drift(eyes, plain, real, base)
    found["diversity"] = _diversity(eyes, subject)
    found["parameters"] = concept.parameters
    found["seconds"] = round(time.monotonic() - started, 2)
    return Scores({name: value for name, value in found.items() if value is not None})


def evaluate_folder(
    pictures: Any,
    photos: Any = None,
    prompts: Sequence[str] | None = None,
    *,
    clip: str | Path | None = None,
    dino: str | Path | None = None,
    judge: bool = False,
) -> Scores:
    """Measure pictures that are there already: a folder or a list.

    photos: real pictures of the subject. prompts: one a picture, in the order of their names; without it the captions
    beside the pictures. judge: read them by the embedded model's judge, in place of CLIP and DINO.
    """
    eyes: Eyes = JudgeEyes() if judge else NetworkEyes(clip, dino)
    loaded = load_pictures(pictures).pictures
    drawn = [p.pixels for p in loaded]
    said = [p.caption for p in loaded] if prompts is None else list(prompts)
    if len(said) != len(drawn):
        raise ValueError(f"{len(drawn)} pictures and {len(said)} prompts: give one prompt for each picture, in order")
    found: dict[str, float | None] = {"pictures": len(drawn)}
    if photos is not None:
        real = [p.pixels for p in load_pictures(photos).pictures]
        found |= similarities(eyes, drawn, real)
    if all(said):
        found["text_similarity"] = _text_similarity(eyes, [str(s) for s in said], drawn)
    elif photos is None:
        raise ValueError("there is nothing to measure against: give photos, or a prompt for each picture")
    return Scores({name: value for name, value in found.items() if value is not None})


def base_of(
    model: Model, class_word: str, *, asks: Sequence[Ask] = ASKS, count: int = 8,
    draw: Callable[..., list[np.ndarray]] | None = None, steps: int = 25, guidance: float | None = None, seed: int = 0,
) -> Base:  # fmt: skip
    """The base model's pictures of a class, for evaluate(base=...)."""
    draw = draw or _drawer(model, steps, guidance, seed)
    prompts = [filled(a.prompt, class_word) for a in asks]
    return Base(class_word, draw([class_prompt(class_word)] * count, []), draw(prompts, []), prompts)


def similarities(eyes: Eyes, drawn: Pictures, real: Pictures, base: Pictures | None = None) -> dict[str, float | None]:
    """Drawn pictures against real ones, beside the real ones among themselves and the base model's."""
    found: dict[str, float | None] = {}
    for name, look in (("subject", eyes.subject), ("image", eyes.image)):
        of_real, of_drawn = look(real), look(drawn)
        if of_real is None or of_drawn is None:
            continue
        found[f"{name}_similarity"] = mean_cosine(of_drawn, of_real)
        if len(real) > 1:
            found[f"{name}_similarity_real"] = mean_other_cosine(of_real)
        if base is not None:
            found[f"{name}_similarity_base"] = mean_cosine(look(base), of_real)  # type: ignore[arg-type]
    found["kid"] = kid(eyes.features(drawn), eyes.features(real)) if min(len(drawn), len(real)) > 1 else None
    found["gap_closed"] = gap_closed(found)
    return found


def gap_closed(found: dict[str, float | None]) -> float | None:
    """How much of the way from the base model's class to the real photos, by DINO or the judge, else by CLIP."""
    for name in ("subject", "image"):
        at, low, high = (found.get(f"{name}_similarity{end}") for end in ("", "_base", "_real"))
        if at is not None and low is not None and high is not None:
            return (at - low) / max(high - low, 1e-6)
    return None


def accuracy(eyes: Eyes, asks: Sequence[Ask], pictures: Pictures) -> dict[str, float]:
    """The share of what the prompts ask for that the judge finds: over all ("all"), by kind of prompt, of backgrounds.

    Empty for eyes that cannot read, and where no prompt says what it shows.
    """
    if not isinstance(eyes, JudgeEyes) or not any(a.shows for a in asks):
        return {}
    read, right = eyes.read(pictures), {}
    for i, ask in enumerate(asks):
        for what, wanted in ask.shows:
            for group in {"all", ask.kind, *(["background"] if what == "background" else [])}:
                right.setdefault(group, []).append(read[what][i] == wanted)
    return {group: float(np.mean(hits)) for group, hits in right.items()}


def _in_prompts(
    eyes: Eyes, asks: Sequence[Ask], asked: Pictures, real: Pictures, base: Base
) -> dict[str, float | None]:
    found: dict[str, float | None] = {"text_similarity": _text_similarity(eyes, base.prompts, asked)}
    found["text_similarity_base"] = _text_similarity(eyes, base.prompts, base.asked)
    subject = eyes.subject(asked) if eyes.subject(real) is not None else None
    if subject is not None:
        found["prompted_similarity"] = mean_cosine(subject, eyes.subject(real))  # type: ignore[arg-type]
    after, before = accuracy(eyes, asks, asked), accuracy(eyes, asks, base.asked)
    if after:
        found |= {"prompt_accuracy": after["all"], "prompt_accuracy_base": before["all"]}
        found["prompt_kept"] = after["all"] / max(before["all"], 1e-6)
        for kind in after:
            if kind != "all":
                found[f"accuracy_{kind}"], found[f"accuracy_{kind}_base"] = after[kind], before[kind]
    return found


def _drift(eyes: Eyes, plain: Pictures, real: Pictures, base: Base) -> dict[str, float | None]:
    moved = gap_closed(similarities(eyes, plain, real, base.plain))
    found: dict[str, float | None] = {"drift_to_subject": moved}
    if len(plain) > 1:
        found["drift_distance"] = kid(eyes.features(plain), eyes.features(base.plain))
    if isinstance(eyes, JudgeEyes):
        for name, pictures in (("class_accuracy", plain), ("class_accuracy_base", base.plain)):
            kinds = eyes.read(pictures)["kind"]
            found[name] = float(np.mean([k == base.class_word for k in kinds]))
    return found


def _diversity(eyes: Eyes, pictures: Pictures) -> float | None:
    rows = eyes.image(pictures)
    rows = eyes.subject(pictures) if rows is None else rows
    return None if rows is None or len(rows) < 2 else 1 - mean_other_cosine(rows)


def _text_similarity(eyes: Eyes, prompts: Sequence[str], pictures: Pictures) -> float | None:
    text, image = eyes.text(prompts), eyes.image(pictures)
    return None if text is None or image is None else float(_row_cosine(text, image).mean())


def _row_cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _eyes(model: Model, clip: str | Path | None, dino: str | Path | None) -> Eyes:
    return _judge() if model.embedded and clip is None and dino is None else NetworkEyes(clip, dino)


@cache
def _judge() -> JudgeEyes:
    return JudgeEyes()


def _drawer(model: Model, steps: int, guidance: float | None, seed: int) -> Callable[..., list[np.ndarray]]:
    def draw(prompts: list[str], concepts: list[Concept], **options: Any) -> list[np.ndarray]:
        from ..sampling.drawing import sample

        drawn = sample(model, prompts, concepts, steps=steps, guidance=guidance, seed=seed, **options)
        return [np.asarray(image) for image in drawn]

    return draw


def _own_prompts(model: Model) -> Sequence[str | Ask]:
    return ASKS if model.embedded else PROMPTS


def _check_prompts(asks: Sequence[Ask]) -> None:
    for ask in asks:
        if "{}" not in ask.prompt:
            raise ValueError(f"the prompt {ask.prompt!r} must hold {{}} where the subject's words go")


def class_prompt(class_word: str) -> str:
    return filled("a photo of a {}", class_word)


def filled(prompt: str, words: str) -> str:
    """The prompt with the subject's words in it, and "an" before a vowel."""
    text = prompt.replace("{}", words)
    return re.sub(r"\ba (?=[aeiou])", "an ", text) if words[:1] in "aeiou" else text
