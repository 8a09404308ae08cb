"""load_concept: a concept from its file, checked against the model it is for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .attach import check_base, check_fits, differs
from .concept import Concept, read_concept

if TYPE_CHECKING:
    from ..model.model import Model


def load_concept(path: str | Path, model: Model | None = None, force: bool = False) -> Concept:
    """A concept from its file.

    Args:
        path: of a concept file; other tools' files go through `import_concept`.
        model: with one, a concept that does not fit it, changes nothing on it or was made on another is refused.
        force: take a concept that was made on another base model all the same.
    """
    concept = read_concept(Path(path))
    if model is not None:
        if not force:
            check_base(concept, model, str(path))
        check_fits(concept, model, str(path))
        check_differs(concept, model, str(path))
    return concept


def check_differs(concept: Concept, model: Model, name: str, force: bool = False) -> None:
    """Raise ValueError where the concept, called `name` in the message, makes no usable change of a prediction.

    force: take one that changes nothing; one whose prediction is NaN or infinite is refused all the same.
    """
    if not differs(model, concept, name) and not force:
        raise ValueError(f"{name} changes nothing on this model: its prediction is the base model's, bit for bit")
