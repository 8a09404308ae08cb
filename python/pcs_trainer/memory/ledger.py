"""Trace tensor lifetimes in a training step: which storage is alive when, in which part of the step, for which layer.

On the meta device a storage has its size and no bytes, so a step of any model is counted in about a second, exactly and
without computing it. Work is counted beside it, in FLOPs plus a price for each byte written.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pcs_kernels import costs
from pcs_kernels.costs import direction, implementation

FLOPS_A_BYTE = 100  # what a byte written costs beside a FLOP: consumer and server GPUs lie between 70 and 170
EMPTY = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.empty_strided)
KINDS = ("kept activations", "gradients", "working memory")


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of a call: 2 per multiply-add of products, convolutions and attention; other ops count by bytes alone."""
    count = costs.formulas().get(packet) or flop_registry.get(packet)
    return count(*args, **kwargs, out_val=out) if count is not None else 0


def _bytes(values: Any) -> int:
    """Bytes of the tensors among some values, or of one."""
    if isinstance(values, Tensor):
        return min(values.nbytes, values.untyped_storage().nbytes())  # what is expanded is read once
    return sum(map(_bytes, values)) if isinstance(values, Iterable) and not isinstance(values, str) else 0


def out_of(out: Any) -> Tensor:
    """The tensor that an op or layer returns first."""
    return out[0] if isinstance(out, (tuple, list)) else out


@dataclass
class _Storage:
    size: int
    born: int
    kind: str
    died: int | None = None


@dataclass
class LayerCount:
    """One layer's share of a step: bytes kept for its backward, the most its backward adds to them, its work."""

    kept: int = 0
    inside: int = 0
    work: float = 0.0


@dataclass
class StepCount:
    """What one step holds beside what was there before it."""

    kept: int  # at the end of the forward
    peak: int
    parts: dict[str, int]  # the peak by kind
    gradients: int  # the most bytes of gradients alive at once
    work: float
    layers: dict[str, LayerCount] = field(default_factory=dict)  # in the order in which they run
    head: int = 0  # the most before the backward reaches a layer, over what was kept then
    calls: list[tuple[float, float]] = field(default_factory=list)  # (FLOPs, bytes read and written) of each
    packed: dict[str, int] = field(default_factory=dict)  # frozen weights packed for the CPU's kernels, by direction


class Ledger(TorchDispatchMode):
    """Counts the storages that are made while it is entered.

    Args:
        owned: tensors that were there before; their storages are not counted.
        whole: count what our ops make inside, as their references compute them, and not their results alone.
    """

    def __init__(self, owned: Iterable[Tensor] = (), whole: bool = False) -> None:
        super().__init__()
        self._whole = whole
        self._owned = {t.untyped_storage()._cdata for t in owned}
        self._alive: dict[int, tuple[_Storage, weakref.ref[Any]]] = {}
        self._all: list[_Storage] = []
        self._now = 0
        self._forward = True
        self._kept = 0
        self._work = 0.0
        self._calls: list[tuple[float, float]] = []
        self._layers: dict[str, LayerCount] = {}
        self._marks: dict[str, int] = {}  # live bytes when a layer's forward ended
        self._before = 0  # live bytes when the last layer's forward ended
        self._segment = ""
        self._packed: dict[tuple[Any, ...], int] = {}
        self._high: dict[str, int] = {}  # the most alive while the backward was in a segment
        self.live = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._whole and func.namespace == "pcs_kernels":
            with self:
                return implementation(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        self._now += 1
        made = 0
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                made += self._add(t)
        packed = costs.packed_weight(func.overloadpacket, args, kwargs)
        if packed is not None:
            self._packs(func.overloadpacket, *packed)
        flops = _flops(func.overloadpacket, args, kwargs, out)
        work = flops + FLOPS_A_BYTE * made
        self._work += work
        if not func.is_view and func.overloadpacket not in EMPTY:
            self._calls.append((flops, _bytes(args) + _bytes(kwargs.values()) + _bytes(out)))
        if not self._forward:
            self._high[self._segment] = max(self._high.get(self._segment, 0), self.live)
            if self._segment:
                self._layers[self._segment].work += work
        return out

    def _add(self, t: Tensor) -> int:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._owned or key in self._alive:
            return 0
        size = storage.nbytes()
        entry = _Storage(size, self._now, "forward" if self._forward else "working memory")
        self._alive[key] = entry, weakref.ref(storage, lambda _: self._drop(key))
        self._all.append(entry)
        self.live += size
        return size

    def _packs(self, packet: Any, weight: Tensor, size: int) -> None:
        key = packet, weight.untyped_storage()._cdata, weight.storage_offset(), weight.shape
        self._packed[key] = size

    def _drop(self, key: int) -> None:
        entry, _ = self._alive.pop(key)
        entry.died = self._now
        self.live -= entry.size

    def watch(self, layers: dict[str, nn.Module]) -> list[Any]:
        """Follow layers through the step.

        Args:
            layers: name -> module.

        Returns:
            The hooks' handles, to be removed after the step.
        """
        return [layer.register_forward_hook(self._left(name)) for name, layer in layers.items()]

    def _left(self, name: str) -> Callable[..., None]:
        def entered(_gradient: Tensor) -> None:
            self._segment = name

        def hook(_module: nn.Module, _inputs: Any, out: Any) -> None:
            self._layers[name] = LayerCount(kept=self.live - self._before)
            self._before = self._marks[name] = self.live
            if out_of(out).requires_grad:
                out_of(out).register_hook(entered)

        return hook

    def forward_ends(self) -> None:
        """Mark the end of the forward: what is alive now was kept for the backward."""
        self._forward = False
        self._kept = self.live
        for entry, _ in self._alive.values():
            entry.kind = "kept activations"

    def is_gradient(self, t: Tensor) -> None:
        """Count a tensor that was made in this step as a parameter's gradient."""
        found = self._alive.get(t.untyped_storage()._cdata)
        if found is not None:
            found[0].kind = "gradients"

    def result(self) -> StepCount:
        """The counts of the finished step."""
        change: dict[int, dict[str, int]] = {}
        for entry in self._all:
            kind = entry.kind if entry.kind in KINDS else "working memory"
            last = self._now if entry.died is None else entry.died
            for when, sign in ((entry.born, 1), (last + 1, -1)):
                at = change.setdefault(when, dict.fromkeys(KINDS, 0))
                at[kind] += sign * entry.size
        now, peak = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        gradients = 0
        for when in sorted(change):
            now = {kind: now[kind] + change[when][kind] for kind in KINDS}
            gradients = max(gradients, now["gradients"])
            if sum(now.values()) > sum(peak.values()):
                peak = now
        for name, layer in self._layers.items():
            layer.inside = self._high.get(name, 0) - self._marks[name]
        head = max(self._high.get("", 0), self._kept) - self._before
        packed = {"forward": 0, "backward": 0}
        for (packet, *_), size in self._packed.items():
            packed[direction(packet)] += size
        return StepCount(
            self._kept, sum(peak.values()), peak, gradients, self._work, self._layers, head, self._calls, packed
        )
