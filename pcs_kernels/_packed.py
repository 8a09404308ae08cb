"""Cache of packed weights, invalidated when the weight changes or dies; which directions may be packed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

from torch import Tensor

from ._heap import SMALL, pages_of_their_own, trim_heap

MOST_VARIANTS = 2  # two input shapes may alternate (a batch and its last, smaller one) without packing anew each time

Directions = Literal["both", "forward", "none"]

_directions: Directions = "both"
_cache: dict[int, tuple[weakref.ref[Tensor], int, dict[Hashable, dict[Hashable, Any]]]] = {}


def weight_version(weight: Tensor) -> tuple[int, int]:
    """What changes whenever a weight is replaced or written to; equal pairs mean that a copy of it still holds.

    Returns:
        The identity of the weight's storage, and its version counter. Writes through `weight.data` are not counted,
        and inference tensors have no counter: they raise.
    """
    return weight.untyped_storage()._cdata, weight._version


def _writes(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def packed(weight: Tensor, kind: Hashable, pack: Callable[[Tensor], Any], variant: Hashable = None) -> Any:
    """pack(weight), computed once until the weight is written to in place.

    Writes through `weight.data` cannot be seen, as nowhere in torch: call `forget_packed_weights()` after them.

    Args:
        weight: the weight; a view is kept under its base, with its place and strides.
        kind: which packing this is: an op and a direction.
        pack: computes it from the detached weight.
        variant: what of the input the best packing depends on, such as its shape; the latest two are kept.
    """
    root = weight if weight._base is None else weight._base
    key = id(root)
    entry = _cache.get(key)
    if entry is None or entry[0]() is not root or entry[1] != _writes(root):
        entry = (weakref.ref(root, lambda _: _cache.pop(key, None)), _writes(root), {})
        _cache[key] = entry
    variants = entry[2].setdefault((kind, weight.data_ptr(), tuple(weight.shape), weight.stride()), {})
    if variant not in variants:
        if len(variants) == MOST_VARIANTS:
            variants.pop(next(iter(variants)))
        # An adapter is smaller, and packed anew in each step.
        with nullcontext() if weight.nbytes < SMALL else pages_of_their_own():
            variants[variant] = pack(weight.detach())
    return variants[variant]


@contextmanager
def packing(directions: Directions) -> Iterator[None]:
    """Keep packed copies of frozen weights (CPU) for both directions, the forward alone or none, inside the `with`.

    A copy is as large as the weight. With none, every large block leaves the process as soon as it is freed: the least
    memory, at the price of new pages in each call. It holds for the whole process, as autograd runs backwards on other
    threads; copies that were made before are used where their direction is allowed, and stay until they are forgotten.
    """
    global _directions
    if directions not in get_args(Directions):
        raise ValueError(f"packing takes one of {', '.join(get_args(Directions))}, not {directions!r}")
    before = _directions
    _directions = directions
    try:
        with pages_of_their_own() if directions == "none" else nullcontext():
            yield
    finally:
        _directions = before


def may_pack(direction: Literal["forward", "backward"]) -> bool:
    """Whether a frozen weight may be kept packed for this direction now."""
    return _directions == "both" or _directions == direction


def forget_packed_weights() -> None:
    """Drop every packed copy, so that the next call packs anew: needed after writes through `weight.data`.

    Their memory goes back to the system, and with it what else was freed.
    """
    _cache.clear()
    trim_heap()
