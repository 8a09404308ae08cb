"""Tensors that stay in the machine's memory and pass through a ring on the device, each ahead of its use.

Frozen weights, and optimizer states, which go back changed. The ring is one block of the device's memory, and all that
they take there. What is taken stays in place until the next one is taken; then its place may be given away. Which one
comes next is learned from the uses themselves: after a and b comes what came after a and b before. So a backward, a
recomputation or a drawing needs no order told, and an order that has changed costs waiting, never a wrong value.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _check as check
from ._fallback import tell_once
from ._packed import weight_version
from .ops.int8_weight import Int8Weight, lent_weight

ALIGN = 256  # bytes; what allocators of devices give, and more than any kernel asks for
AHEAD = 32  # weights that are looked for behind the one in use; the ring's size ends it earlier where they are large


class Copier(Protocol):
    """Copies to or from the device, in their own order beside its work. A mark is a moment of that work."""

    def copy(self, pairs: list[tuple[Tensor, Tensor]], after: list[Any]) -> Any:
        """Copy (to, from) pairs once the moments in `after` have passed; what is returned tells when they are there."""

    def wait(self, ready: Any) -> None:
        """Let the device's work go on when a copy is there."""

    def finish(self, ready: Any) -> None:
        """Let the host wait until a copy is there."""

    def uses(self, block: Tensor) -> None:
        """Its copies touch this memory: it is nobody else's before they are done."""

    def mark(self) -> Any:
        """The moment at which the work given to the device so far is done."""


class AtOnce:
    """Each copy is there when `copy` returns: devices without streams of their own."""

    def copy(self, pairs: list[tuple[Tensor, Tensor]], after: list[Any]) -> Any:
        del after  # the device's work is in one order
        for to, given in pairs:
            to.copy_(given)

    def wait(self, ready: Any) -> None:
        pass

    finish = uses = wait

    def mark(self) -> Any:
        return None


class OnAStream:
    """Copies on a CUDA stream beside the one that computes; the host waits for neither."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def copy(self, pairs: list[tuple[Tensor, Tensor]], after: list[Any]) -> Any:
        for moment in after:
            self.stream.wait_event(moment)
        with torch.cuda.stream(self.stream):
            for to, given in pairs:
                to.copy_(given, non_blocking=True)
            return self.stream.record_event()

    def wait(self, ready: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(ready)

    def finish(self, ready: Any) -> None:
        ready.synchronize()

    def uses(self, block: Tensor) -> None:
        block.record_stream(self.stream)

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()


class Streamed:
    """Tensors in the machine's memory that are used on the device together.

    Args:
        ring: through which they reach the device.
        sources: the tensors; parameters whose data may be replaced.
    """

    def __init__(self, ring: WeightRing, *sources: Tensor) -> None:
        for t in sources:
            check.tensor("a source", t)
        self.ring, self.sources = ring, sources
        self.written: Any = None  # when a copy back to the machine's memory is there
        ring._check(self.size)

    @property
    def size(self) -> int:
        """Bytes that they take of the ring."""
        return streamed_bytes(*(t.nbytes for t in self.sources))

    def finish(self) -> None:
        """Let the host wait until what was written back is in the machine's memory."""
        if self.written is not None:
            self.ring.outward.finish(self.written)

    def _versions(self) -> tuple[tuple[int, int], ...]:
        """What changes when a source is replaced or written to."""
        return tuple(map(weight_version, self.sources))


class StreamedWeight(Streamed):
    """A frozen weight in the machine's memory, in the place of a tensor wherever an op takes a frozen one.

    Args:
        ring: through which it reaches the device.
        sources: the weight, or the codes and scales of one in 8 bits.
    """

    @property
    def shape(self) -> torch.Size:
        """The weight's shape."""
        return self.sources[0].shape

    def take(self) -> Tensor | Int8Weight:
        """The weight on the device, until the next one of its ring is taken."""
        tensors = self.ring.take(self)
        return tensors[0] if len(tensors) == 1 else Int8Weight(*tensors)


class _Place:
    """Where in the ring a weight lies."""

    def __init__(self, at: int, weight: Streamed) -> None:
        self.at, self.size, self.versions = at, weight.size, weight._versions()
        self.held = [t.detach() for t in weight.sources]  # so that no other storage has the address of one of theirs
        self.tensors: list[Tensor] = []
        self.ready: Any = None  # when its copy is there
        self.used: list[Any] = []  # when the work that read it is done


class WeightRing:
    """A block of a device's memory through which frozen weights, or optimizer states, pass.

    Args:
        device: where the weights are used.
        size: bytes of the block: at least the largest weight, and a few more for copies to run ahead.
        copier: makes the copies; default: a stream for each direction on an NVIDIA or AMD GPU, at once elsewhere.
    """

    def __init__(self, device: torch.device | str, size: int, copier: Copier | None = None) -> None:
        check.require(isinstance(size, int) and size >= 0, lambda: f"size must be a number of bytes, not {size!r}")
        self.device, self.size = torch.empty(0, device=device).device, size  # with its number, as tensors have it
        self.copier, self.outward = (copier or _copier(self.device) for _ in range(2))
        self.taken = self.missed = 0  # weights that were taken, and those of them that were not on their way
        self._block: Tensor | None = None
        self._made: Any = None  # when the work that had the block's memory before is done
        self._here: dict[Streamed, _Place] = {}  # from the longest unused on
        self._next: dict[Streamed, dict[int, Streamed]] = {}  # b -> {id of a: what came after a and b}
        self._last: tuple[Streamed | None, Streamed | None] = (None, None)
        self._ended = True  # the use of what was taken last
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        """For copies and pickles: another ring of this size."""
        return WeightRing, (self.device, self.size)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other thread take anything: it could be in the place of what this one is still using."""
        with self._lock:
            try:
                yield
            finally:
                self._end_use()  # on this thread's stream

    def drop(self, *weights: Streamed) -> None:
        """Expect these no more; where they lie on the device others may be."""
        with self._lock:
            self._end_use()  # of what was taken last, while it is still known
            for weight in weights:
                self._next.pop(weight, None)
            gone = set(weights)
            for last, after in self._next.items():
                self._next[last] = {before: weight for before, weight in after.items() if weight not in gone}
            self._last = tuple(None if weight in gone else weight for weight in self._last)  # type: ignore[assignment]

    def _check(self, size: int) -> None:
        """ValueError where a weight of so many bytes does not fit."""
        if size > self.size:
            raise ValueError(f"a weight of {size} bytes does not fit a ring of {self.size}. Fix: a larger ring")

    def forget(self) -> None:
        """Give the block back until a weight is taken again, and forget in which order they come."""
        with self._lock:
            self._end_use()
            for weight, place in self._here.items():  # what is given back must not be touched by a copy any more
                self.copier.wait(place.ready)
                if weight.written is not None:
                    self.outward.wait(weight.written)
            self._block, self._last = None, (None, None)
            self._here.clear()
            self._next.clear()

    def take(self, weight: Streamed) -> list[Tensor]:
        """The weight's tensors on the device, until the next call."""
        with self._lock:
            self._end_use()
            place = self._here.get(weight)
            self.taken += 1
            if place is None or place.versions != weight._versions():
                self.missed += 1
                self._check(weight.size)
                place = self._fetch(weight, set())
                assert place is not None
            self._here[weight] = self._here.pop(weight)  # used last
            before, last = self._last
            if last is not None:
                self._next.setdefault(last, {})[id(before)] = weight
            self._last, self._ended = (last, weight), False
            self._fetch_ahead()
            self.copier.wait(place.ready)
            return place.tensors

    def write_back(self, streamed: Streamed) -> None:
        """Copy what was taken last, and has been changed on the device, back to the machine's memory.

        The host may read it there after `finish` of it.
        """
        with self._lock:
            place = self._here[streamed]
            pairs = [(source.detach(), t) for source, t in zip(streamed.sources, place.tensors, strict=True)]
            streamed.written = self.outward.copy(pairs, [self.copier.mark()])
            place.versions = streamed._versions()  # the device has the same values

    def _end_use(self) -> None:
        """All work that reads the weight that was taken last has been given to the device."""
        last = self._last[1]
        place = None if last is None else self._here.get(last)
        if last is not None and place is not None and not self._ended:
            place.used = [self.copier.mark()] + [last.written] * (last.written is not None)
        self._ended = True

    def _fetch_ahead(self) -> None:
        """Copies of the weights that will come next, for as many as there is room without what comes before them."""
        before, last = self._last
        assert last is not None
        soon = {last}
        for _ in range(AHEAD):
            weight = self._next.get(last, {}).get(id(before))
            if weight is None:
                return
            if weight not in self._here and self._fetch(weight, soon) is None:
                return
            soon.add(weight)
            before, last = last, weight

    @torch.inference_mode(False)  # what is made in a first use inside of it serves all later ones
    @torch.no_grad()
    def _fetch(self, weight: Streamed, keep: set[Streamed]) -> _Place | None:
        """Begin the copy of a weight, in the place of others than those in `keep`; None where these leave no room."""
        if self._block is None:
            self._block = torch.empty(self.size, dtype=torch.uint8, device=self.device)
            for copier in (self.copier, self.outward):
                copier.uses(self._block)
            self._made = self.copier.mark()
        gone = [self._here[weight]] if weight in self._here else []  # of values that it has no longer
        at = self._gap(weight.size, gone)
        for other in [w for w in self._here if w not in keep]:
            if at is not None:
                break
            gone.append(self._here[other])
            at = self._gap(weight.size, gone)
        if at is None:
            return None
        self._here = {w: place for w, place in self._here.items() if place not in gone}
        place = _Place(at, weight)
        pairs = []
        for source in weight.sources:
            part = self._block[at : at + source.nbytes].view(source.dtype)
            place.tensors.append(part.as_strided(source.shape, _strides(source), part.storage_offset()))
            pairs.append((place.tensors[-1], source.detach()))
            at += _aligned(source.nbytes)
        after = [self._made, *(moment for one in gone for moment in one.used)]
        place.ready = self.copier.copy(pairs, after + [weight.written] * (weight.written is not None))
        self._here[weight] = place
        return place

    def _gap(self, size: int, gone: list[_Place]) -> int | None:
        """Where a weight fits between those that stay."""
        at = 0
        for place in sorted((p for p in self._here.values() if p not in gone), key=lambda p: p.at):
            if place.at - at >= size:
                break
            at = place.at + place.size
        return at if self.size - at >= size else None


def _copier(device: torch.device) -> Copier:
    return OnAStream(device) if device.type == "cuda" else AtOnce()


def streamed_bytes(*sizes: int) -> int:
    """Bytes that tensors of these sizes take of a ring together."""
    return sum(map(_aligned, sizes))


def on_the_host(t: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor from which a device copies without the host's waiting: in pinned memory, where it can be."""
    t = t.cpu() if t.device.type != "cpu" else t
    if device.type != "cuda":
        return t
    try:
        return t.pin_memory()
    except RuntimeError as error:
        why = str(error).splitlines()[0].rstrip(".")
        tell_once("pinned", f"no pinned memory for weights that wait in RAM ({why}): their copies hold up the host")
        return t


def _strides(t: Tensor) -> tuple[int, ...]:
    """A tensor's own, or where it leaves gaps or repeats elements those of a copy."""
    filled = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride != filled:
            return torch.empty_like(t, device="meta", memory_format=torch.contiguous_format).stride()
        filled *= size
    return t.stride()


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


FrozenWeight = Tensor | Int8Weight | StreamedWeight
Parts = tuple[Tensor | None, Tensor | None, StreamedWeight | None]


def parts_of(weight: FrozenWeight) -> Parts:
    """(a tensor or codes, scales, where a weight is streamed from), as autograd's functions take them."""
    if isinstance(weight, StreamedWeight):
        return None, None, weight
    return (*weight, None) if isinstance(weight, Int8Weight) else (weight, None, None)


def keep(ctx: Any, parts: Sequence[Any]) -> None:
    """Keep for the backward what a weight is made of, or where it lies: not the weight."""
    codes, scales, ctx.source = parts
    ctx.save_for_backward(codes, scales)


def kept(ctx: Any) -> Parts:
    """What `keep` kept."""
    codes, scales = ctx.saved_tensors
    return codes, scales, ctx.source


def taken(parts: Sequence[Any]) -> Tensor | Int8Weight:
    """A weight in 8 bits, or a streamed one, where it is used: for one product, before the next one is asked for."""
    codes, scales, source = parts
    if source is not None:
        weight: Tensor | Int8Weight = source.take()
        return weight
    return Int8Weight(codes, scales)


def lent(parts: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """`taken`, one in 8 bits as a tensor of `dtype`; a 1x1 convolution's keeps its shape."""
    weight = taken(parts)
    return lent_weight(weight, dtype) if isinstance(weight, Int8Weight) else weight
