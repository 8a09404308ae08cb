"""Compress a concept: its weights' differences cut down to their largest singular values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attach import check_base, check_fits
from .base_weights import BaseWeights
from .concept import Concept
from .grammar import Kind, names, pair_names, spell

if TYPE_CHECKING:
    from ..model.model import Model

ROUNDING = 1e-9  # of a sum of float64: where the kept values are exactly `ratio` of all, they are within it


def compress(concept: Concept, model: Model | None = None, ratio: float = 0.6) -> Concept:
    """The concept with low-rank residuals in place of whole weights, and smaller ranks in place of larger ones.

    Of each difference the largest singular values are kept, at least one. Convolutions over several pixels, norms,
    biases and embeddings stay as they are.

    Args:
        concept: what to compress.
        model: the base model; needed where the concept holds whole values.
        ratio: the share of the singular values' sum to keep (Custom Diffusion's compression).
    """
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"ratio = {ratio}: expected a share of the singular values' sum, above 0 and at most 1")
    base = BaseWeights(model) if model is not None else None
    if model is not None:
        check_base(concept, model, concept.key)
        check_fits(concept, model, concept.key)
    tensors: dict[str, Tensor] = {}
    for slot, (down, up) in concept.residuals().items():
        down_name, up_name = names(slot)
        tensors[down_name], tensors[up_name] = _cut(*_product_svd(down, up), ratio, down.dtype)
    for slot, value in concept.changes().items():
        if base is None:
            raise ValueError(f"{spell(slot)} is a whole value: give the base model (model=...) it differs from")
        module = slot.layer.removesuffix(".weight")
        down_name, up_name = pair_names(slot.part, module)
        fits = slot.layer.endswith(".weight") and base.takes_residual(f"{slot.part}.{module}")
        if not fits or down_name in tensors:
            tensors[spell(slot)] = value
            continue
        change = value.float()
        if slot.kind is Kind.VALUE:
            change = change - base.value(slot.path).to(change)
        u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
        tensors[down_name], tensors[up_name] = _cut(u, s, vh, ratio, value.dtype)
    return replace(concept, tensors=tensors, meta=concept.meta | {"compressed": f"{ratio:g}"})


def _product_svd(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition (u, s, vh) of up @ down, without making the product."""
    left, a = torch.linalg.qr(up.float())
    right, b = torch.linalg.qr(down.float().T)
    u, s, vh = torch.linalg.svd(a @ b.T, full_matrices=False)
    return left @ u, s, vh @ right.T


def kept_values(s: Tensor, ratio: float) -> int:
    """How many of the singular values `s`, largest first, stay within `ratio` of their sum; at least one."""
    within = s.double().cumsum(0) <= ratio * s.double().sum() * (1 + ROUNDING)
    return max(1, int(within.sum()))


def _cut(u: Tensor, s: Tensor, vh: Tensor, ratio: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(down, up) of the kept part; each gets the square root of the singular values."""
    k = kept_values(s, ratio)
    root = s[:k].sqrt()
    return (root[:, None] * vh[:k]).to(dtype).contiguous(), (u[:, :k] * root).to(dtype).contiguous()
