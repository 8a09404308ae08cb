"""Weights packed once for a kernel and kept beside the weight, for as long as it lives and is not written to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

_cache: dict[int, tuple[weakref.ref[Tensor], int, dict[Hashable, Any]]] = {}


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def packed(weight: Tensor, kind: Hashable, pack: Callable[[Tensor], Any]) -> Any:
    """pack(weight), computed once per `kind` until the weight is written to in place.

    Writes through `weight.data` cannot be seen, as nowhere in torch: call `forget_packed_weights()` after them.
    """
    root = weight if weight._base is None else weight._base
    key = id(root)
    entry = _cache.get(key)
    if entry is None or entry[0]() is not root or entry[1] != _version(root):
        entry = (weakref.ref(root, lambda _: _cache.pop(key, None)), _version(root), {})
        _cache[key] = entry
    place = (kind, weight.data_ptr(), tuple(weight.shape), weight.stride())
    if place not in entry[2]:
        entry[2][place] = pack(weight.detach())
    return entry[2][place]


def forget_packed_weights() -> None:
    """Drop every packed copy; the next call packs afresh."""
    _cache.clear()
