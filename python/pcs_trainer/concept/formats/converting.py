"""Layers of another tool's file as a concept's tensors: pairs where one can sit, differences from the base elsewhere.

Low-rank products of four kinds are known. W is the base weight, s = alpha / rank:
    LoRA   s up down                          LoHa   s (w1_a w1_b) * (w2_a w2_b)    (arXiv 2108.06098)
    LoKr   s w1 (x) w2                        DoRA   m (W + d) / |W + d| - W, d being one of these  (arXiv 2402.09353)
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ..base_weights import BaseWeights
from ..grammar import Kind, Part, difference_name, pair_names, parse, spell
from .recognizing import FACTORS, Found
from .scales import Scale

DIFFERENCES = {"diff": "weight", "diff_b": "bias"}  # kohya's ending -> the parameter it is added to
MAGNITUDES = ("magnitude", "dora_scale")  # PEFT's name, and LyCORIS's
Layer = dict[str, Tensor]  # a layer's tensors by kind


def converted(found: Found, file: Path, base: BaseWeights, scale_of: Scale) -> dict[str, Tensor]:
    """The contents by a concept's names, in float32, each shape checked against the model."""
    tensors: dict[str, Tensor] = {}
    for (part, module), own in found.layers.items():
        try:
            tensors |= _layer(part, module, own, base, scale_of)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    for name, value in found.tensors.items():
        tensors[name] = value
    return {name: _shaped(name, value.float(), file, base) for name, value in tensors.items()}


def _layer(part: Part, module: str, own: Layer, base: BaseWeights, scale_of: Scale) -> dict[str, Tensor]:
    path, own = f"{part}.{module}", {name: t.float() for name, t in own.items()}
    tensors = {}
    for key, parameter in DIFFERENCES.items():
        if key in own:
            tensors[difference_name(part, f"{module}.{parameter}")] = own[key]
    kind = _kind(path, own)
    if kind is None:
        return tensors
    weight = base.parameters.get(f"{path}.weight")
    if weight is None:
        raise ValueError(f"{path!r} has no weight in this model")
    if kind == "lora" and not own.keys() & {"mid", *MAGNITUDES} and base.takes_residual(path):
        down, up = (half.flatten(1) for half in _needed(path, own, "down", "up"))
        if up.shape[0] != weight.shape[0] or down.shape[1] != weight.shape[1] or up.shape[1] != len(down):
            raise ValueError(_misfit(path, own, weight))
        up = up * _scale(path, own, len(down), scale_of(part, module, len(down)))
        return tensors | dict(zip(pair_names(part, module), (down.contiguous(), up.contiguous()), strict=True))
    product, rank = _product(kind, path, own)
    if product.numel() != weight.numel() or product.shape[0] != weight.shape[0]:
        raise ValueError(_misfit(path, own, weight))
    change = product.reshape(weight.shape) * _scale(path, own, rank, scale_of(part, module, rank))
    if own.keys() & set(MAGNITUDES):
        change = _decomposed(path, base.value(f"{path}.weight").float(), change, own)
    name = difference_name(part, f"{module}.weight")
    before = tensors.get(name)
    if before is not None and before.numel() == change.numel():
        change = change + before.reshape(change.shape)
    return tensors | {name: change.contiguous()}


def _kind(path: str, own: Layer) -> str | None:
    """Which of the low-rank products a layer's factors make; None where there are none."""
    kinds = [kind for kind, names in FACTORS.items() if own.keys() & names]
    if len(kinds) > 1:
        raise ValueError(f"the layer {path!r} has factors of two kinds: {', '.join(sorted(own))}")
    if not kinds and own.keys() & set(MAGNITUDES):
        raise ValueError(f"the layer {path!r} has DoRA's magnitudes and no low-rank factors")
    return kinds[0] if kinds else None


def _misfit(path: str, own: Layer, weight: Tensor) -> str:
    shapes = ", ".join(f"{kind} {list(t.shape)}" for kind, t in own.items() if kind != "alpha")
    return f"{path!r} has {shapes}; this model's weight there is {list(weight.shape)}"


def _scale(path: str, own: Layer, rank: int, otherwise: float) -> float:
    alpha = own.get("alpha")
    if alpha is None:
        return otherwise
    if alpha.numel() != 1 or not math.isfinite(float(alpha)):
        raise ValueError(f"the alpha of {path!r} has shape {list(alpha.shape)}; expected one finite number")
    return float(alpha) / rank if rank else 1.0  # LoKr of two whole factors has no rank, and no scale


def _product(kind: str, path: str, own: Layer) -> tuple[Tensor, int]:
    """What a layer's low-rank factors make, not yet scaled, and their rank."""
    maker = {"lora": _lora_product, "hada": _hadamard_product, "lokr": _kronecker_product}[kind]
    try:
        return maker(path, own)
    except RuntimeError:  # torch's words for factors that do not fit each other
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in sorted(own.items()))
        raise ValueError(f"the factors of {path!r} do not fit each other: {shapes}") from None


def _needed(path: str, own: Layer, *names: str) -> list[Tensor]:
    for name in names:
        if name not in own:
            halves = "half of its low-rank pair" if name in ("down", "up") else "of its low-rank factors"
            raise ValueError(f"the layer {path!r} has no {name!r} {halves}")
        if own[name].dim() < 2 or not own[name].numel():
            raise ValueError(f"{name!r} of {path!r} has shape {list(own[name].shape)}; expected a matrix")
    return [own[name] for name in names]


def _lora_product(path: str, own: Layer) -> tuple[Tensor, int]:
    down, up = _needed(path, own, "down", "up")
    if "mid" in own:
        return _tucker(_needed(path, own, "mid")[0], up.flatten(1).T, down.flatten(1)), len(down)
    return (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:]), len(down)  # [O, I, kh, kw]


def _hadamard_product(path: str, own: Layer) -> tuple[Tensor, int]:
    a1, b1, a2, b2 = _needed(path, own, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    if "hada_t1" in own:
        t1, t2 = _needed(path, own, "hada_t1", "hada_t2")
        return _tucker(t1, a1, b1) * _tucker(t2, a2, b2), len(b1)
    return (a1 @ b1) * (a2 @ b2), len(b1)


def _kronecker_product(path: str, own: Layer) -> tuple[Tensor, int]:
    factors, rank = [], 0
    for number in (1, 2):
        whole, a, b, t = (f"lokr_{kind}{number}{end}" for kind, end in (("w", ""), ("w", "_a"), ("w", "_b"), ("t", "")))
        if whole in own:
            factors += _needed(path, own, whole)
            continue
        left, right = _needed(path, own, a, b)
        factors.append(_tucker(_needed(path, own, t)[0], left, right) if t in own else left @ right)
        rank = len(right)
    first, second = factors
    return torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - first.dim())), second.contiguous()), rank


def _tucker(middle: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A convolution's weight [O, I, kh, kw] of factors middle [r1, r2, kh, kw], left [r1, O], right [r2, I]."""
    return torch.einsum("ijkl,io,jc->ockl", middle, left, right)


def _decomposed(path: str, weight: Tensor, change: Tensor, own: Layer) -> Tensor:
    """DoRA's change of a weight: its rows (or, as LyCORIS has it too, its columns) scaled to the magnitudes."""
    magnitude, total, ones = own.get("magnitude", own.get("dora_scale")), weight + change, [1] * (weight.dim() - 2)
    assert magnitude is not None  # one of the two is there
    rows, columns = weight.shape[:2]
    by_column = "magnitude" not in own and list(magnitude.shape[:2]) == [1, columns]
    if magnitude.numel() != (columns if by_column else rows):
        raise ValueError(f"DoRA's magnitudes of {path!r} have shape {list(magnitude.shape)}, for {rows} x {columns}")
    shape, axis = ([1, columns], 1) if by_column else ([rows, 1], 0)
    size = total.transpose(0, axis).flatten(1).norm(dim=1).reshape(*shape, *ones)
    return total * (magnitude.reshape(*shape, *ones) / size) - weight


def _shaped(name: str, value: Tensor, file: Path, base: BaseWeights) -> Tensor:
    """A whole value or a difference in the shape of its parameter; half of a pair as it is."""
    slot = parse(name)
    if not bool(value.isfinite().all()):
        raise ValueError(f"{file}: {name!r} is not finite once its factors are multiplied; the file is unusable")
    if slot.kind is Kind.PAIR:
        return value
    weight = base.parameters.get(slot.path)
    if weight is not None and value.numel() == weight.numel() and value.dim() != weight.dim():
        value = value.reshape(weight.shape)
    if weight is None or weight.shape != value.shape:
        here = "nothing" if weight is None else list(weight.shape)
        raise ValueError(f"{file}: {spell(slot)!r} has shape {list(value.shape)}; this model has {here} there")
    return value
