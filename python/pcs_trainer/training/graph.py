"""A step's work on the device, recorded once and replayed: no Python between its kernels (CUDA graphs).

At batch 1 the host needs longer to launch a step than a fast GPU to do it. What a step reads anew is in its inputs,
which are copied into the recording's own tensors, and in numbers that the optimizer keeps on the device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor

from ..distributed import rank_and_world
from ..settings import Settings
from .inputs import PARTS, mapped, tensors

WARM = 2  # eager steps of a shape before it is recorded: optimizer states and kernels are made in them


class Recorder(Protocol):
    """What records the work of a function."""

    runs: bool  # whether recording does the work, too

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """(what does the work again, the function's result, written anew each time)"""


class Owner(Protocol):
    """Whose state a recorded function changes."""

    @property
    def is_settled(self) -> bool:
        """Whether every later call does the same as the one that is recorded."""

    def recorded(self) -> None:
        """Make ready for the first replay."""

    def forget(self) -> None:
        """Drop what a call that broke off has gathered."""


class CudaGraphs:
    """CUDA graphs that share their memory; recorded on the stream that everything runs on."""

    runs = False

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        gc.collect()
        torch.cuda.empty_cache()  # what eager steps have left is no use to a graph, which has memory of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream()):
            result = run()
        return graph.replay, result


def recorder_for(s: Settings, device: torch.device) -> Recorder | None:
    """What records this run's steps, or None where they run eagerly."""
    possible = device.type == "cuda" and torch.version.hip is None and rank_and_world()[1] == 1
    # What is streamed comes by copies that the host orders, one after the other.
    fixed = s.optimizer == "adamw8bit" and s.resident == s.states == "device"
    return CudaGraphs() if possible and s.graph == "auto" and fixed else None


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run on a stream that can be recorded: gradients are accumulated on the stream on which training began."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


class Replayed:
    """A function of inputs, recorded for each shape that comes often enough.

    Args:
        run: the function: work of the device alone, but for what it makes ready in its first calls.
        recorder: records it; None leaves every call eager.
        warn: told once where it cannot be recorded; it then runs eagerly.
        owner: whose state the function changes: asked whether it can be recorded yet, told before the first replay and
            after a recording that failed halfway.
    """

    def __init__(
        self, run: Callable[[Any], Tensor], recorder: Recorder | None, warn: Callable[[str], None], owner: Owner
    ) -> None:
        self.run, self.recorder, self.warn, self.owner = run, recorder, warn, owner
        self._seen: dict[Any, int] = {}
        self._kept: dict[Any, tuple[Any, Callable[[], Any], Tensor]] = {}
        self.replays = 0

    def has_recorded(self, given: Any) -> bool:
        """Whether these inputs would be replayed."""
        return self.recorder is not None and bool(self._kept) and _shape_of(given) in self._kept

    def forget(self) -> bool:
        """Let go of what is recorded, and its memory, until a shape comes again; False where there is nothing."""
        found = bool(self._kept)
        self._kept.clear()
        self._seen.clear()  # eager steps come first again: gradients have other places, and tables are made anew
        return found

    def __call__(self, given: Any) -> Tensor:
        """The function's result; a later call may write to the same tensor."""
        if self.recorder is None:
            return self.run(given)
        key = _shape_of(given)
        if key not in self._kept:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= WARM or not self.owner.is_settled:
                return self.run(given)
            return self._record(self.recorder, key, given)
        own, replay, result = self._kept[key]
        for ours, theirs in zip(tensors(own), tensors(given), strict=True):
            ours.copy_(theirs, non_blocking=True)
        replay()
        self.replays += 1
        return result

    def _record(self, recorder: Recorder, key: Any, given: Any) -> Tensor:
        own = mapped(torch.clone, given)
        try:
            replay, result = recorder.record(lambda: self.run(own))
        except Exception as error:  # torch has no class of its own for what a graph cannot hold
            self.warn(f"steps run without a CUDA graph, as recording one failed: {' '.join(str(error).split())[:200]}")
            self.recorder = None
            self.owner.forget()
            return self.run(given)
        self._kept[key] = own, replay, result
        if not recorder.runs:
            self.owner.recorded()
            replay()
        return result


def _shape_of(part: Any) -> Any:
    """What two inputs of one recording have in common: all that the device reads, but for its values."""
    if isinstance(part, Tensor):
        return tuple(part.shape), part.dtype
    if isinstance(part, (list, tuple)):
        return tuple(map(_shape_of, part))
    if isinstance(part, dict):
        return tuple((name, _shape_of(one)) for name, one in part.items())
    if isinstance(part, PARTS):
        return tuple(_shape_of(getattr(part, f.name)) for f in fields(part))
    # what stands for the host alone, such as the texts that token ids were made from, is no part of it
    return part if part is None or isinstance(part, int) else None
