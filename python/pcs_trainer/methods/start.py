"""The start of a training: a method's setup done on a model."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary, ref

from torch import nn

from ..data.prompts import Vocabulary
from ..model.model import Model
from ..model.text_adapters import adapters
from ..settings import Settings
from . import method_named
from .learner import KEY, Learner

# The last learner on a network: parameters that train in place do not tell whose they are.
_HOLDERS: WeakKeyDictionary[nn.Module, ref[Learner]] = WeakKeyDictionary()


def learner_for(model: Model, subjects: Sequence[Settings], vocabulary: Vocabulary | None = None) -> Learner:
    """A method's setup done on a model: what trains, on it, with the words of every subject.

    Args:
        model: what is changed in place until `Learner.restore`.
        subjects: the settings of each subject; they differ in token and class word, and the first one's decide.
        vocabulary: what learned words start from, where it is not the model's own.
    """
    first = subjects[0]
    if is_taken(model):
        raise ValueError(
            f"another training has its tensors on {model.name}: run it to its end or call its learner.restore(), "
            "or load the model once more"
        )
    learner = Learner(model, first.seed, vocabulary)
    try:
        method_named(first.method).setup(model, first, learner)
        for other in subjects[1:]:
            learner.add_subject_word(other)
        if not learner.parameters:
            raise ValueError(f"{first.method} trains nothing on this model: its setup attached no tensor")
    except BaseException:
        learner.restore()  # nothing half done stays on the model
        raise
    _HOLDERS[model.unet] = ref(learner)  # weak: a learner holds its model
    return learner


def is_taken(model: Model) -> bool:
    """Whether what another training trains is on the model."""
    known = _HOLDERS.get(model.unet)
    holder = None if known is None else known()
    if holder is not None and holder.holds:
        return True
    if any(r.key == KEY for layer in model.unet.modules() for r in getattr(layer, "residuals", ())):
        return True
    encoders = model.text_encoders if "text_encoders" in getattr(model, "loaded", ()) else []  # loads none for this
    return any(r.key == KEY for encoder in encoders for r, _ in adapters(encoder).residuals)
