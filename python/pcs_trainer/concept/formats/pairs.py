"""The low-rank residuals that other programs know, in the shapes of their files."""

from __future__ import annotations

from torch import Tensor

from ..base_weights import BaseWeights
from ..concept import Concept
from ..grammar import Kind, Slot

Pairs = dict[Slot, tuple[Tensor, Tensor]]  # (down, up)


def plain_pairs(concept: Concept) -> Pairs:
    """The residuals that act on every token, as matrices."""
    return {slot: pair for slot, pair in concept.residuals().items() if slot.kind is Kind.PAIR}


def shaped_pairs(concept: Concept, base: BaseWeights | None) -> Pairs:
    """The same, with the shape of a 1x1 convolution [.., .., 1, 1] where the base model's layer is one.

    base: None guesses by the model family: only SD1.x's transformers have such projections.
    """
    return {
        slot: (down[:, :, None, None], up[:, :, None, None]) if _is_convolution(concept, slot, base) else (down, up)
        for slot, (down, up) in plain_pairs(concept).items()
    }


def _is_convolution(concept: Concept, slot: Slot, base: BaseWeights | None) -> bool:
    if base is not None:
        return base.parameters[f"{slot.path}.weight"].dim() == 4
    return slot.layer.endswith(("proj_in", "proj_out")) and concept.meta.get("family", "sd1") == "sd1"
