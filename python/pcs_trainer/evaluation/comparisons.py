"""Sets of pictures compared with each other, with prompts, and with what the prompts ask for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .image_encoders import ImageEncoder, Pictures, kid, mean_cosine, mean_other_cosine
from .prompts import Ask

SMALLEST_GAP = 1e-6  # keeps the shares finite where the base model is as good as the photos, or finds nothing


def similarities(
    encoder: ImageEncoder, drawn: Pictures, real: Pictures, base: Pictures | None = None
) -> dict[str, float | None]:
    """Compare sampled pictures with real ones, and those among themselves and with the base model's.

    Args:
        encoder: what compares them.
        drawn: sampled pictures.
        real: photos of the subject.
        base: pictures of its class by the base model.

    Returns:
        subject_similarity and image_similarity with their _real and _base, kid, gap_closed; None where unknown.
    """
    found: dict[str, float | None] = {}
    for name, rows_of in (("subject", encoder.subject), ("image", encoder.image)):
        of_real, of_drawn = rows_of(real), rows_of(drawn)
        if of_real is None or of_drawn is None:
            continue
        found[f"{name}_similarity"] = mean_cosine(of_drawn, of_real)
        if len(real) > 1:
            found[f"{name}_similarity_real"] = mean_other_cosine(of_real)
        of_base = None if base is None else rows_of(base)
        if of_base is not None:
            found[f"{name}_similarity_base"] = mean_cosine(of_base, of_real)
    found["kid"] = kid(encoder.features(drawn), encoder.features(real)) if min(len(drawn), len(real)) > 1 else None
    found["gap_closed"] = gap_closed(found)
    return found


def gap_closed(found: dict[str, float | None]) -> float | None:
    """How much of the way from the base model's class to the real photos, by DINO or the judge, else by CLIP."""
    for name in ("subject", "image"):
        at, low, high = (found.get(f"{name}_similarity{end}") for end in ("", "_base", "_real"))
        if at is not None and low is not None and high is not None:
            return (at - low) / max(high - low, SMALLEST_GAP)
    return None


def accuracy(encoder: ImageEncoder, asks: Sequence[Ask], pictures: Pictures) -> dict[str, float]:
    """The share of what the prompts ask for that the judge finds.

    Returns:
        Over all ("all"), by kind of prompt, and of backgrounds; empty for encoders that cannot read pictures, and where
        no prompt says what it shows.
    """
    read = encoder.read(pictures) if any(a.shows for a in asks) else None
    if read is None:
        return {}
    right: dict[str, list[bool]] = {}
    for i, ask in enumerate(asks):
        for what, wanted in ask.shows:
            for group in {"all", ask.kind, *(["background"] if what == "background" else [])}:
                right.setdefault(group, []).append(read[what][i] == wanted)
    return {group: float(np.mean(hits)) for group, hits in right.items()}


def diversity(encoder: ImageEncoder, pictures: Pictures) -> float | None:
    """1 less the mean similarity of every two pictures, by CLIP or the judge, else by DINO."""
    rows = encoder.image(pictures)
    rows = encoder.subject(pictures) if rows is None else rows
    return None if rows is None or len(rows) < 2 else 1 - mean_other_cosine(rows)


def text_similarity(encoder: ImageEncoder, prompts: Sequence[str], pictures: Pictures) -> float | None:
    """Mean similarity of each picture to its prompt."""
    text, image = encoder.text(prompts), encoder.image(pictures)
    return None if text is None or image is None else float((text * image).sum(1).mean())
