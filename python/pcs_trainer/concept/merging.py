"""Custom Diffusion's merge of several concepts without training (arXiv 2212.04488, equation 4).

For each key and value matrix W0 [D, C] of the attention over the text, the merged W

    minimizes  |W Creg' - W0 Creg'|     subject to     W C' = V

C [n, C] are the text states of all subjects' own words, V [n, D] what each concept's fine-tuned matrix makes of its
rows, Creg [N, C] the text states of general captions. With G = Creg' Creg and d = C G^-1, in closed form:

    W = W0 + (V - W0 C')(d C')^-1 d
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.fingerprint import fingerprint
from ..model.text import Text, encode
from .attach import check_base, check_fits
from .base_weights import BaseWeights
from .blending import joined_meta, joined_words
from .captions import general_captions
from .concept import Concept
from .grammar import UNET, Kind, parse, value_name

if TYPE_CHECKING:
    from ..model.model import Model

# Of G's largest eigenvalue; the paper and its code have none, and this much keeps what a factorization needs. Measured
# on the embedded model, four trained concepts in three merges: general captions' keys and values move as far as with
# none (0.41, 0.64 and 0.93 of their size), 1.9 to 2 times as far at the 6e-3 of earlier versions, and the subjects in
# twenty prompts are no worse (mean |W c - Wn c| / |W0 c - Wn c| of 0.44, 0.47, 0.60; at 6e-3 0.44, 0.48, 0.79).
RIDGE = 1e-5
# A row whose part outside the others' span is below this share (squared) repeats them. Measured on the embedded model:
# 2e-3 and more for the rows of three concepts, 4e-16 for the same concept under two names.
DEPENDENT = 1e-10
ROUNDS = 3  # of solving: the second and third take out what rounding left of the constraint
CAPTIONS_AT_ONCE = 16  # of 77 tokens: the largest activation of SDXL's second encoder [1232, 5120] is 25 MB in float32


@dataclass
class Merged(Concept):
    """A merged concept, and how well its matrices keep what the concepts asked of them.

    constraint_residual: the largest |W C' - V| / |V| of a matrix, over the rows that were kept.
    dropped_residual: the same over the rows left out because others repeat them; 0 without any.
    """

    constraint_residual: float = 0.0
    dropped_residual: float = 0.0
    dropped_rows: int = 0


def gram(creg: Tensor, ridge: float) -> Tensor:
    """G = Creg' Creg in float64, with a ridge relative to its largest eigenvalue so that it can be inverted."""
    g = creg.double().T @ creg.double()
    return g + ridge * torch.linalg.matrix_norm(g, 2) * torch.eye(len(g), dtype=g.dtype)


def independent_rows(m: Tensor, limit: float = DEPENDENT) -> list[int]:
    """The rows of C that no others repeat, by a pivoted Cholesky factorization of m = C G^-1 C'."""
    scale = m.diagonal().clamp_min(torch.finfo(m.dtype).tiny).rsqrt()
    m = scale[:, None] * m * scale  # [n, n] with a diagonal of ones: long rows count as much as short ones
    left, factor = m.diagonal().clone(), torch.zeros_like(m)
    kept: list[int] = []
    for k in range(len(m)):
        pivot = int(left.argmax())
        if left[pivot] <= limit:
            break
        column = (m[:, pivot] - factor[:, :k] @ factor[pivot, :k]) / left[pivot].sqrt()
        factor[:, k] = column
        left = (left - column.square()).clamp_min(0)
        left[[*kept, pivot]] = -1  # never chosen again
        kept.append(pivot)
    return sorted(kept)


class Constraint:
    """What depends on the text alone, made once for all matrices: d = C G^-1 and the factor of d C'."""

    def __init__(self, c: Tensor, creg: Tensor, ridge: float = RIDGE) -> None:
        g = gram(creg, ridge)
        factor, failed = torch.linalg.cholesky_ex(g)
        if failed or not bool(torch.isfinite(factor).all()):
            raise ValueError("the general captions' text states span too little; give more captions or a larger ridge")
        d = torch.cholesky_solve(c.double().T, factor).T  # [n, C]
        self.kept = independent_rows(d @ c.double().T)
        self.c, self.d = c.double()[self.kept], d[self.kept]
        m = self.d @ self.c.T  # [n, n]
        self.factor = torch.linalg.cholesky((m + m.T) / 2)  # symmetric but for rounding

    def solve(self, w0: Tensor, v: Tensor) -> Tensor:
        """The merged matrix for W0 [D, C] and the kept rows' targets V [n, D], in float64."""
        w = w0.double()
        for _ in range(ROUNDS):
            missing = v.double() - self.c @ w.T
            w = w + torch.cholesky_solve(missing, self.factor).T @ self.d
        return w


def merge(
    concepts: Sequence[Concept], model: Model, regularization: Sequence[str] | None = None, ridge: float = RIDGE
) -> Merged:
    """One concept that draws what each of them draws.

    Args:
        concepts: at least two, of Custom Diffusion's kind: changes of key and value matrices, and a word each.
        model: their base model.
        regularization: general captions, whose text states keep their keys and values; default: built-in ones.
        ridge: added to G's diagonal, as a share of its largest eigenvalue.
    """
    if len(concepts) < 2:
        raise ValueError("merge needs at least two concepts")
    matrices = _matrices(model)
    words = joined_words(concepts)
    for concept in concepts:
        check_base(concept, model, concept.key)
        check_fits(concept, model, concept.key)
        _check_kind(concept, matrices)
    with torch.no_grad():
        c = [_target_states(model, concept) for concept in concepts]
        creg = _general_states(model, list(regularization or general_captions(model)))
        constraint = Constraint(torch.cat(c), creg, ridge)
        return _solved(concepts, model, matrices, words, c, constraint)


def _solved(
    concepts: Sequence[Concept],
    model: Model,
    matrices: list[str],
    words: dict[str, list[Tensor]],
    c: list[Tensor],
    constraint: Constraint,
) -> Merged:
    base, rows = BaseWeights(model), torch.cat(c).double()
    dropped = [i for i in range(len(rows)) if i not in constraint.kept]
    tensors, residual, dropped_residual = {}, 0.0, 0.0
    for name in matrices:
        w0 = base.value(name)
        tuned = [base.tuned(concept, name) for concept in concepts]
        if all(w is None for w in tuned):
            continue
        v = torch.cat([x.double() @ (w0 if w is None else w).double().T for x, w in zip(c, tuned, strict=True)])
        w = constraint.solve(w0, v[constraint.kept])
        error = (rows @ w.T - v).abs() / v.abs().max()
        residual = max(residual, float(error[constraint.kept].max()))
        dropped_residual = max(dropped_residual, float(error[dropped].max()) if dropped else 0.0)
        tensors[name] = w.to(w0.dtype)
    meta = joined_meta(concepts) | {
        "title": " + ".join(concept.key for concept in concepts),
        "merged": ", ".join(concept.key for concept in concepts),
        "constraint_residual": f"{residual:.3e}",
        "dropped_rows": str(len(dropped)),
    }
    return Merged(
        "custom_diffusion", tensors, words, meta, fingerprint(model), residual, dropped_residual, len(dropped)
    )


def _matrices(model: Model) -> list[str]:
    """The key and value matrices of the attention over the text, by a concept's names."""
    blocks = model.unet.attention_names()
    return [value_name(UNET, f"{b}.attn2.{layer}.weight") for b in blocks for layer in ("to_k", "to_v")]


def _check_kind(concept: Concept, matrices: list[str]) -> None:
    weights = {parse(name).layer for name in matrices}
    for name in concept.tensors:
        slot = parse(name)
        weight = f"{slot.layer}.weight" if slot.kind is Kind.PAIR else slot.layer
        joins = slot.part == UNET and slot.kind in (Kind.PAIR, Kind.VALUE, Kind.DIFFERENCE) and weight in weights
        if not joins:
            raise ValueError(
                f"{concept.key}: {name!r} is not a key or value matrix of the attention over the text, and merge joins "
                "only those; use blend for low-rank concepts of other kinds"
            )


def _target_states(model: Model, concept: Concept) -> Tensor:
    """The text states [n, C] that name the concept's subjects: of "V* cat" and "photo of a V* cat" from V* to the end.

    Of each of several subjects that were learned together. The reference's code takes both prompts too.
    """
    found = []
    for (token, _), name in zip(concept.subjects, concept.names, strict=True):
        if not token:
            raise ValueError(f"{concept.key}: merge needs the word that names each subject, and one here has none")
        for prompt in (name, f"photo of a {name}"):
            text = encode(model, [prompt], concept.words)
            first = text.places(0, token)[0]
            found.append(_plain(text)[0, first : text.ids[0].length(0)].cpu())
    return torch.cat(found)


def _general_states(model: Model, captions: list[str]) -> Tensor:
    """The text states [N, C] of captions without their first token and their padding."""
    found = []
    for start in range(0, len(captions), CAPTIONS_AT_ONCE):
        text = encode(model, captions[start : start + CAPTIONS_AT_ONCE])
        states = _plain(text)
        found += [states[i, 1 : text.ids[0].length(i)].cpu() for i in range(len(states))]
    return torch.cat(found)


def _plain(text: Text) -> Tensor:
    """The states [B, T, C] that all blocks read alike: nothing is attached here."""
    if isinstance(text.states, dict):
        raise ValueError("another concept's context residuals are on the model: take them off before merging")
    return text.states
