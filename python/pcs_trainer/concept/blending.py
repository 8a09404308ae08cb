"""Blend concepts: the weighted sum of several as one concept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.fingerprint import same_base
from .base_weights import BaseWeights
from .concept import Concept
from .grammar import OWN_WORD, TEXT_PARTS, Kind, Slot, names, parse, spell

if TYPE_CHECKING:
    from ..model.model import Model

SHARED = ("family", "prediction", "base_name", "resolution")  # of `meta`: what concepts of one base model have alike
SUMS_TO_ONE = 1e-12  # float64's rounding of a sum of weights, with room: 0.1 + 0.2 + 0.7 is 1 - 1e-16


def blend(concepts: Sequence[Concept], weights: Sequence[float], model: Model | None = None) -> Concept:
    """One concept that does what all of them do at these strengths.

    Low-rank residuals join to one of the summed rank, exactly.

    Args:
        concepts: of one base model, with words of their own.
        weights: one for each concept.
        model: the base model. Needed where whole values W are blended and their weights do not sum to one, or not
            every concept has them: W0 + sum of weight * (W - W0).
    """
    weights = [float(w) for w in weights]
    if not concepts or len(concepts) != len(weights):
        raise ValueError(f"{len(concepts)} concepts and {len(weights)} weights: give one weight for each concept")
    _check_alike(concepts)
    base = BaseWeights(model) if model is not None else None
    tensors = _summed_residuals(concepts, weights) | _summed_changes(concepts, weights, base)
    methods = {c.method for c in concepts}
    method = methods.pop() if len(methods) == 1 else "blend"
    return Concept(method, tensors, joined_words(concepts), _blended_meta(concepts, weights), concepts[0].base)


def joined_words(concepts: Sequence[Concept]) -> dict[str, list[Tensor]]:
    """All concepts' learned words. Raises ValueError where one word has two meanings."""
    words: dict[str, list[Tensor]] = {}
    for concept in concepts:
        for word, rows in concept.words.items():
            taken = words.setdefault(word, rows)
            if any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(taken, rows, strict=True)):
                raise ValueError(f"two concepts both use the word {word!r}: give one another name with .renamed(...)")
    return words


def joined_meta(concepts: Sequence[Concept]) -> dict[str, str]:
    """The part of `meta` that a concept made of concepts has from them: the base model's facts, subjects, a prompt."""
    meta = {name: concepts[0].meta[name] for name in SHARED if name in concepts[0].meta}
    pairs = (pair for c in concepts for pair in zip(c.subjects, c.names, strict=True) if any(pair[0]))
    found = list(dict.fromkeys(pairs))  # a concept that is given twice has its subjects once
    if not found:
        return meta | {"instance_prompt": "a photo"}
    meta |= {
        "subjects": json.dumps([subject for subject, _ in found]),
        "names": json.dumps([name for _, name in found]),
    }
    if len(found) == 1:
        meta |= {"token": found[0][0][0], "class_word": found[0][0][1]}
    return meta | {"instance_prompt": "a photo of " + " and ".join(f"a {name}" for _, name in found)}


def _summed_residuals(concepts: Sequence[Concept], weights: Sequence[float]) -> dict[str, Tensor]:
    """Residuals of one place side by side: the downs [R1 + R2, C_in], the weighted ups [C_out, R1 + R2]."""
    found: dict[Slot, list[tuple[Tensor, Tensor]]] = {}
    for concept, weight in zip(concepts, weights, strict=True):
        for slot, (down, up) in concept.residuals().items():
            found.setdefault(slot, []).append((down, up * weight))
    tensors = {}
    for slot, pairs in found.items():
        down_name, up_name = names(slot)
        tensors[down_name] = torch.cat([down for down, _ in pairs])
        tensors[up_name] = torch.cat([up for _, up in pairs], dim=1)
    return tensors


def _summed_changes(
    concepts: Sequence[Concept], weights: Sequence[float], base: BaseWeights | None
) -> dict[str, Tensor]:
    """Whole values and differences, summed in float64."""
    found: dict[Slot, list[tuple[Tensor, float]]] = {}
    for concept, weight in zip(concepts, weights, strict=True):
        for slot, value in concept.changes().items():
            found.setdefault(slot, []).append((value, weight))
    tensors = {}
    for slot, values in found.items():
        first = values[0][0]
        total = torch.zeros_like(first, dtype=torch.float64)
        for value, weight in values:
            total = total + value.double() * weight
        left = 0.0 if slot.kind is Kind.DIFFERENCE else 1.0 - sum(weight for _, weight in values)
        if abs(left) > SUMS_TO_ONE:
            if base is None:
                raise ValueError(
                    f"{spell(slot)} is a whole value and its weights sum to {1 - left:g}: "
                    "give the base model (model=...), which makes up the rest"
                )
            total = total + left * base.value(slot.path).to(total)
        tensors[spell(slot)] = total.to(first.dtype)
    return tensors


def _blended_meta(concepts: Sequence[Concept], weights: Sequence[float]) -> dict[str, str]:
    meta = {"title": " + ".join(f"{w:g} {c.key}" for c, w in zip(concepts, weights, strict=True))}
    meta |= joined_meta(concepts)
    if any(c.hold_first for c in concepts):
        meta["hold_first"] = "1"
    return meta


def _check_alike(concepts: Sequence[Concept]) -> None:
    for concept in concepts:
        own = next((name for name in concept.tensors if parse(name).kind in OWN_WORD), None)
        if own is not None:
            raise ValueError(
                f"{concept.key}: {own!r} acts only from that concept's own word on, so it joins no other concept; "
                "put both on the model together instead"
            )
        if concept.base and concepts[0].base and not same_base(concept.base, concepts[0].base):
            raise ValueError(f"{concept.key} and {concepts[0].key} were made on different base models")
    if any(c.hold_first for c in concepts):
        for concept in concepts:
            if not concept.hold_first and concept.touches(TEXT_PARTS):
                raise ValueError(
                    f"{concept.key} changes the text's first token and another of the concepts keeps it, so no one "
                    "concept can do both; put both on the model together instead"
                )
