"""What the embedded model's judge says of pictures: how like the photos they are, and whether prompts came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Prompts with a place for the subject, and what the judge must read in a picture of each.
PROMPTS: tuple[tuple[str, dict[str, str]], ...] = (
    ("a photo of a {}", {}),
    ("a {} on the beach", {"background": "beach"}),
    ("a {} underwater", {"background": "underwater"}),
    ("a {} in the snow", {"background": "snow"}),
    ("a {} in front of a brick wall", {"background": "brick"}),
    ("a painting of a {} at night", {"background": "night", "style": "painting"}),
)


@dataclass
class Verdict:
    """likeness: mean cosine of pictures and photos; photos: the same among the photos; right: one a picture."""

    likeness: float
    photos: float
    right: list[bool]

    @property
    def accuracy(self) -> float:
        return sum(self.right) / max(1, len(self.right))


def small(picture: Any) -> Any:
    """A picture as the judge takes it: uint8 [64, 64, 3]."""
    import numpy as np
    from PIL import Image

    shown = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    return np.asarray(shown.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC))


def judged(photos: Sequence[Any], pictures: Sequence[Any], truths: Sequence[dict[str, str]], kind: str) -> Verdict:
    """Pictures of one subject, each with what its prompt asked for; the kind counts where the judge knows it."""
    import numpy as np

    from .tiny.judge import load_judge
    from .tiny.world import CLASSES

    judge = load_judge()
    of_photos = judge.subject_embedding(np.stack([small(p) for p in photos]))
    drawn = np.stack([small(p) for p in pictures])
    likeness = float((judge.subject_embedding(drawn) @ of_photos.T).mean())
    n = len(of_photos)
    among = float((of_photos @ of_photos.T).sum() - n) / max(1, n * (n - 1))
    read = judge.read(drawn)
    wanted = [truth | ({"kind": kind} if kind in CLASSES else {}) for truth in truths]
    right = [all(read[key][i] == value for key, value in truth.items()) for i, truth in enumerate(wanted)]
    return Verdict(likeness, among if n > 1 else 1.0, right)
