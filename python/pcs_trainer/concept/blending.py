"""Concepts made of concepts: the weighted sum of several, and one cut down to its largest singular values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.fingerprint import same_base
from .concept import Concept, check_base, check_fits
from .formats.layer_names import Layers

if TYPE_CHECKING:
    from ..model.model import Model

SHARED = ("family", "prediction", "base_name", "resolution")


def joined_words(concepts: Sequence[Concept]) -> dict[str, list[Tensor]]:
    """All concepts' learned words; one word with two meanings is refused."""
    words: dict[str, list[Tensor]] = {}
    for concept in concepts:
        for word, rows in concept.words.items():
            taken = words.setdefault(word, rows)
            if any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(taken, rows, strict=True)):
                raise ValueError(f"two concepts both use the word {word!r}: give one another name with .renamed(...)")
    return words


def blend(concepts: Sequence[Concept], weights: Sequence[float], model: Model | None = None) -> Concept:
    """One concept that does what all of them do at these strengths; it needs no base model while only residuals add up.

    Low-rank pairs join to one pair of the summed rank, exactly. Whole values W need the base W0 (give `model`) unless
    every concept has them and the weights sum to one: W0 + sum of weight * (W - W0).
    """
    weights = [float(w) for w in weights]
    if not concepts or len(concepts) != len(weights):
        raise ValueError(f"{len(concepts)} concepts and {len(weights)} weights: give one weight for each concept")
    _check_alike(concepts)
    tensors: dict[str, Tensor] = {}
    stems = {stem: None for concept in concepts for stem in concept.pairs()}
    for stem in stems:
        found = [(c.pairs()[stem], w) for c, w in zip(concepts, weights, strict=True) if stem in c.pairs()]
        tensors[f"{stem}.down"] = torch.cat([down for (down, _), _ in found])
        tensors[f"{stem}.up"] = torch.cat([up * w for (_, up), w in found], dim=1)
    layers = Layers(model) if model is not None else None
    for name in {name: None for concept in concepts for name in concept.wholes()}:
        values = [(c.tensors[name], w) for c, w in zip(concepts, weights, strict=True) if name in c.tensors]
        total = sum(value.double() * w for value, w in values)
        left = 0.0 if name.endswith(".diff") else 1.0 - sum(w for _, w in values)
        if abs(left) > 1e-12:
            if layers is None:
                raise ValueError(
                    f"{name} is a whole value and its weights sum to {1 - left:g}: "
                    "give the base model (model=...), which makes up the rest"
                )
            total = total + left * layers.parameters[name].double().to(total.device)
        tensors[name] = total.to(values[0][0].dtype)
    first = concepts[0].meta
    meta = {"title": " + ".join(f"{w:g} {c.key}" for c, w in zip(concepts, weights, strict=True))}
    meta |= {name: first[name] for name in SHARED if name in first}
    if any(c.hold_first for c in concepts):
        meta["hold_first"] = "1"
    named = [" ".join(filter(None, ("a", c.token, c.class_word))) for c in concepts if c.token]
    meta["instance_prompt"] = "a photo of " + " and ".join(named) if named else "a photo"
    methods = {c.method for c in concepts}
    return Concept(
        methods.pop() if len(methods) == 1 else "blend", tensors, joined_words(concepts), meta, concepts[0].base
    )


def _check_alike(concepts: Sequence[Concept]) -> None:
    for concept in concepts:
        for name in concept.tensors:
            if ".causal_" in name or name.startswith("context."):
                raise ValueError(
                    f"{concept.key}: {name!r} works from that concept's own word on, so it joins no other concept; "
                    "put both on the model together instead"
                )
        if concept.base and concepts[0].base and not same_base(concept.base, concepts[0].base):
            raise ValueError(f"{concept.key} and {concepts[0].key} were made on different base models")
    if any(c.hold_first for c in concepts):
        for concept in concepts:
            if not concept.hold_first and any(name.startswith("text_encoder") for name in concept.tensors):
                raise ValueError(
                    f"{concept.key} changes the text's first token, and another of the concepts holds it still; "
                    "the two make no one concept"
                )


def compress(concept: Concept, model: Model | None = None, ratio: float = 0.6) -> Concept:
    """The largest singular values of each difference, as long as their sum is within `ratio` of all; at least one.

    Whole values need the base model. Convolutions over several pixels, norms, biases and embeddings stay as they are.
    """
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"ratio = {ratio}; it is the share of the singular values' sum to keep, above 0 and at most 1")
    layers = Layers(model) if model is not None else None
    if model is not None:
        check_base(concept, model, concept.key)
        check_fits(concept, model, concept.key)
    tensors: dict[str, Tensor] = {}
    for stem, (down, up) in concept.pairs().items():
        ends = (".causal_down", ".causal_up") if stem.endswith(".causal") else (".down", ".up")
        stem = stem.removesuffix(".causal")
        tensors[stem + ends[0]], tensors[stem + ends[1]] = _cut(*_pair_values(down, up), ratio, down.dtype)
    for name, value in concept.wholes().items():
        module = name.removesuffix(".diff").removesuffix(".weight")
        if layers is None:
            raise ValueError(f"{name} is a whole value: give the base model (model=...) it differs from")
        fits = name.removesuffix(".diff").endswith(".weight") and layers.takes_residual(module)
        if not fits or f"{module}.down" in tensors:
            tensors[name] = value
            continue
        change = value.float() if name.endswith(".diff") else value.float() - layers.parameters[name].float()
        values = torch.linalg.svd(change.flatten(1), full_matrices=False)
        tensors[f"{module}.down"], tensors[f"{module}.up"] = _cut(*values, ratio, value.dtype)
    return replace(concept, tensors=tensors, meta=concept.meta | {"compressed": f"{ratio:g}"})


def _pair_values(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of up @ down without making the product."""
    left, a = torch.linalg.qr(up.float())
    right, b = torch.linalg.qr(down.float().T)
    u, s, vh = torch.linalg.svd(a @ b.T, full_matrices=False)
    return left @ u, s, vh @ right.T


def kept_values(s: Tensor, ratio: float) -> int:
    """How many singular values are kept."""
    within = s.double().cumsum(0) <= ratio * s.double().sum() * (1 + 1e-9)
    return max(1, int(within.sum()))


def _cut(u: Tensor, s: Tensor, vh: Tensor, ratio: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(down, up) of the kept part; both get the same share of its size."""
    k = kept_values(s, ratio)
    root = s[:k].sqrt()
    return (root[:, None] * vh[:k]).to(dtype).contiguous(), (u[:, :k] * root).to(dtype).contiguous()
