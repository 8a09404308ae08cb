"""Evaluate a concept: subject fidelity, prompt fidelity, diversity, and class drift.

    evaluate(model, concept, photos)                  samples pictures; the embedded model's judge reads them
    evaluate_folder(pictures, photos, prompts, ...)   measures pictures that exist already

For real checkpoints the image encoders are CLIP and DINO from folders on this machine: CLIP-T is `text_similarity`,
CLIP-I is `image_similarity`, DINO is `subject_similarity`, and `kid` is the kernel distance on DINO's (or CLIP's)
features.

`pres` and `div` are DreamBooth's (arXiv 2208.12242, section 4.4, table 3). PRES: the mean DINO similarity between
generated pictures of the class, asked for without the subject's word, and real pictures of the subject; high where the
class has collapsed into the subject. DIV: the mean LPIPS between generated pictures of the subject with one prompt. The
paper calls that LPIPS a "cosine similarity", but counts more as better: it is the distance, on a network that the paper
does not name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.pictures import load_pictures
from ..sampling.lag import Lag
from .comparisons import SMALLEST_GAP, accuracy, diversity, gap_closed, similarities, text_similarity
from .image_encoders import ClipDinoEncoder, ImageEncoder, JudgeEncoder, Pictures, kid, mean_cosine
from .perceptual import Distance, load_lpips, mean_distance
from .prompts import ASKS, Ask, asks_for, filled, photo_of_class

if TYPE_CHECKING:
    from ..concept.concept import Concept
    from ..model.model import Model


class Scores(dict[str, float]):
    """Name -> number; as text, one line each."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name.replace('_', ' '):<{width}}  {value:g}" for name, value in rounded(self).items())

    def asdict(self) -> dict[str, float]:
        """The scores as a plain dict."""
        return dict(self)


def rounded(found: dict[str, float]) -> dict[str, float]:
    """The numbers with four decimals."""
    return {name: round(value, 4) for name, value in found.items()}


def _known(found: dict[str, float | None]) -> Scores:
    return Scores({name: value for name, value in found.items() if value is not None})


@dataclass
class Base:
    """What the base model samples for a class: the baseline that a concept is compared with."""

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
    lpips: bool = False,
    base: Base | None = None,
    eyes: ImageEncoder | None = None,
    draw: Callable[..., list[np.ndarray]] | None = None,
) -> Scores:
    """Sample with a concept, and with the base model beside it, and measure both.

    Args:
        model: the model that the concept was trained on.
        concept: what is evaluated.
        photos: real pictures of the subject that it was not trained on: a folder or a list. Of a concept of several
            subjects: a dict from each subject's word to its photos.
        prompts: with {} for the subject; default: the model's own set.
        count: number of pictures of the subject prompt, and of the class.
        steps, guidance, seed, lag: as `sample` takes them; `lag` has no effect on the class images.
        clip, dino: folders of image encoders; needed for every model but the embedded one, which has its judge.
        lpips: measure DIV too, by the package lpips.
        base: result of `base_of`, to sample the base model once for several concepts.
        eyes: image encoder; default: the embedded model's judge, or CLIP and DINO.
        draw: (prompts, concepts, **options) -> pictures, in place of `sample`.

    Returns:
        Those of these scores that can be had:

        subject_similarity      subject fidelity: sampled pictures to the photos; beside it _base (the class by the base
                                model) and _real (the photos among themselves)
        gap_closed              (subject_similarity - base) / (real - base)
        image_similarity, kid   the same comparison by CLIP, and as a kernel distance
        prompted_similarity     subject fidelity in the pictures of `prompts`
        prompt_accuracy         share of what the prompts ask for that the judge finds, over all prompts
        accuracy_KIND           the same by kind of prompt; beside each _base
        prompt_kept             prompt_accuracy over the base model's
        text_similarity         pictures to their prompts without the subject's own word; beside it _base
        diversity               mean distance between pictures of the subject prompt
        div                     the same by LPIPS; beside it that of class images, _class, and before training,
                                _class_base
        pres                    class images after training to the photos: less is better; beside it _base
        drift_to_subject        class drift: how far "a photo of a [class]" has moved towards the subject, as a share of
                                the same gap
        drift_distance          kernel distance between class images before and after training
        class_accuracy          share of class images after training that show the class; beside it _base
        parameters, seconds     trainable parameters of the concept, and the time that this took

        Of several subjects each score is their mean, and beside it stands each subject's own as WORD/SCORE.
    """
    shared: dict[str, Any] = {"prompts": prompts, "count": count, "steps": steps, "guidance": guidance, "seed": seed}
    shared |= {"lag": lag, "eyes": eyes or _encoder_of(model, clip, dino), "draw": draw}
    shared["distance"] = load_lpips() if lpips else None
    if not isinstance(photos, Mapping) and len(concept.subjects) == 1:
        return _of_one(model, concept, photos, base=base, **shared)
    each = {}
    for word, number in _subjects_with_photos(concept, photos).items():
        own = concept.of_subject(number)
        known = base if base is not None and base.class_word == own.class_word else None
        each[word] = _of_one(model, own, photos[word], base=known, **shared)
    return _means(each)


def _means(each: Mapping[str, Scores]) -> Scores:
    """Each score's mean over the subjects, and beside it the subjects' own where there are several."""
    names = [name for name in next(iter(each.values())) if all(name in own for own in each.values())]
    means = {name: float(np.mean([own[name] for own in each.values()])) for name in names}
    means["seconds"] *= len(each)
    if len(each) == 1:
        return Scores(means)
    own = {f"{word}/{name}": own[name] for word, own in each.items() for name in own}
    return Scores(
        means | {name: value for name, value in own.items() if not name.endswith(("/parameters", "/seconds"))}
    )


def _subjects_with_photos(concept: Concept, photos: Any) -> dict[str, int]:
    """Word -> number of each subject that has photos; ValueError where that is not said."""
    known = {token or class_word: i for i, (token, class_word) in enumerate(concept.subjects)}
    words = ", ".join(map(repr, known))
    if not isinstance(photos, Mapping):
        raise ValueError(f"{concept.key} has the subjects {words}: give the photos of each, {{word: photos}}")
    unknown = [word for word in photos if word not in known]
    if unknown or not photos:
        what = f"photos of {unknown[0]!r}" if unknown else "no photos"
        raise ValueError(f"there are {what}, and the subjects of {concept.key} are {words}")
    return {word: known[word] for word in photos}


def _of_one(
    model: Model,
    concept: Concept,
    photos: Any,
    *,
    prompts: Sequence[str | Ask] | None,
    count: int,
    steps: int,
    guidance: float | None,
    seed: int,
    lag: bool | Lag,
    base: Base | None,
    eyes: ImageEncoder,
    distance: Distance | None,
    draw: Callable[..., list[np.ndarray]] | None,
) -> Scores:
    """`evaluate` for a concept of one subject."""
    started = time.monotonic()
    encoder = eyes
    asks = asks_for(model, prompts)
    draw = draw or _sampler(model, steps, guidance, seed)
    base = base or base_of(model, concept.class_word, asks=asks, count=count, draw=draw)
    real = [p.pixels for p in load_pictures(photos).pictures]
    name = concept.subject_words
    masked: dict[str, Any] = {"lag": lag} if lag else {}
    subject = draw([concept.instance_prompt] * count, [concept], **masked)
    asked = draw([filled(a.prompt, name) for a in asks], [concept], **masked)
    plain = draw([photo_of_class(base.class_word)] * count, [concept])  # without LAG: its words are not in this prompt
    found = similarities(encoder, subject, real, base.plain) | _in_prompts(encoder, asks, asked, real, base)
    found |= _drift(encoder, plain, real, base)
    found["diversity"] = diversity(encoder, subject)
    if distance is not None:
        for name, pictures in (("div", subject), ("div_class", plain), ("div_class_base", base.plain)):
            found[name] = mean_distance(distance, pictures)
    found["parameters"] = concept.parameters
    found["seconds"] = round(time.monotonic() - started, 2)
    return _known(found)


def evaluate_folder(
    pictures: Any,
    photos: Any = None,
    prompts: Sequence[str] | None = None,
    *,
    clip: str | Path | None = None,
    dino: str | Path | None = None,
    judge: bool = False,
) -> Scores:
    """Measure pictures that exist already.

    Args:
        pictures: a folder or a list.
        photos: real pictures of the subject.
        prompts: one a picture, in the order of their names; default: the captions beside the pictures.
        clip, dino: folders of image encoders.
        judge: use the embedded model's judge in place of CLIP and DINO.
    """
    encoder: ImageEncoder = JudgeEncoder() if judge else ClipDinoEncoder(clip, dino)
    loaded = load_pictures(pictures).pictures
    drawn = [p.pixels for p in loaded]
    said = [p.caption for p in loaded] if prompts is None else list(prompts)
    if len(said) != len(drawn):
        raise ValueError(f"{len(drawn)} pictures and {len(said)} prompts: give one prompt for each picture, in order")
    found: dict[str, float | None] = {"pictures": len(drawn)}
    if photos is not None:
        real = [p.pixels for p in load_pictures(photos).pictures]
        found |= similarities(encoder, drawn, real)
    if all(said):
        found["text_similarity"] = text_similarity(encoder, [str(s) for s in said], drawn)
    elif photos is None:
        raise ValueError("there is nothing to measure against: give photos, or a prompt for each picture")
    return _known(found)


def base_of(
    model: Model,
    class_word: str,
    *,
    asks: Sequence[Ask] = ASKS,
    count: int = 8,
    draw: Callable[..., list[np.ndarray]] | None = None,
    steps: int = 25,
    guidance: float | None = None,
    seed: int = 0,
) -> Base:
    """Sample the base model's pictures of a class, for `evaluate(base=...)`; the arguments are those of `evaluate`."""
    draw = draw or _sampler(model, steps, guidance, seed)
    prompts = [filled(a.prompt, class_word) for a in asks]
    return Base(class_word, draw([photo_of_class(class_word)] * count, []), draw(prompts, []), prompts)


def _in_prompts(
    encoder: ImageEncoder, asks: Sequence[Ask], asked: Pictures, real: Pictures, base: Base
) -> dict[str, float | None]:
    found: dict[str, float | None] = {"text_similarity": text_similarity(encoder, base.prompts, asked)}
    found["text_similarity_base"] = text_similarity(encoder, base.prompts, base.asked)
    of_asked, of_real = encoder.subject(asked), encoder.subject(real)
    if of_asked is not None and of_real is not None:
        found["prompted_similarity"] = mean_cosine(of_asked, of_real)
    after, before = accuracy(encoder, asks, asked), accuracy(encoder, asks, base.asked)
    if after:
        found |= {"prompt_accuracy": after["all"], "prompt_accuracy_base": before["all"]}
        found["prompt_kept"] = after["all"] / max(before["all"], SMALLEST_GAP)
        for kind in after:
            if kind != "all":
                found[f"accuracy_{kind}"], found[f"accuracy_{kind}_base"] = after[kind], before[kind]
    return found


def _drift(encoder: ImageEncoder, plain: Pictures, real: Pictures, base: Base) -> dict[str, float | None]:
    moved = similarities(encoder, plain, real, base.plain)
    found: dict[str, float | None] = {"drift_to_subject": gap_closed(moved)}
    found |= {f"pres{end}": moved.get(f"subject_similarity{end}") for end in ("", "_base")}
    if len(plain) > 1:
        found["drift_distance"] = kid(encoder.features(plain), encoder.features(base.plain))
    for name, pictures in (("class_accuracy", plain), ("class_accuracy_base", base.plain)):
        read = encoder.read(pictures)
        if read is not None:
            found[name] = float(np.mean([kind == base.class_word for kind in read["kind"]]))
    return found


def _encoder_of(model: Model, clip: str | Path | None, dino: str | Path | None) -> ImageEncoder:
    return _judge() if model.embedded and clip is None and dino is None else ClipDinoEncoder(clip, dino)


@cache
def _judge() -> JudgeEncoder:
    return JudgeEncoder()


def _sampler(model: Model, steps: int, guidance: float | None, seed: int) -> Callable[..., list[np.ndarray]]:
    def draw(prompts: list[str], concepts: list[Concept], **options: Any) -> list[np.ndarray]:
        from ..sampling.drawing import sample

        drawn = sample(model, prompts, concepts, steps=steps, guidance=guidance, seed=seed, **options)
        return [np.asarray(image) for image in drawn]

    return draw
