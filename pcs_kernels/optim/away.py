"""Optimizer states that wait in the machine's memory: each is on the device for its own parameter's update."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..ops.adamw8bit.codes import blocks
from ..streaming import Streamed, WeightRing, streamed_bytes

CODED = ("state1", "state2", "absmax1", "absmax2")  # of a state in 8 bits, by its names
RING = 4  # in largest states: one in use, one on its way back, and two that are ahead


def ring_bytes(elements: int, block_size: int = 256) -> int:
    """Bytes of the ring on the device where the largest parameter has so many elements."""
    scales = 4 * blocks(elements, block_size)
    return RING * streamed_bytes(elements, elements, scales, scales)


class StatesAway:
    """The coded states of an optimizer's parameters, in the machine's memory between two updates.

    Args:
        block_size: of the states.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._rings: dict[torch.device, WeightRing] = {}
        self._of: dict[Tensor, Streamed] = {}  # by its codes of m

    def make_room(self, largest: Mapping[torch.device, int]) -> None:
        """A ring on each device for states of up to so many elements."""
        for device, elements in largest.items():
            size, ring = ring_bytes(elements, self.block_size), self._rings.get(device)
            if ring is not None and ring.size >= size:
                continue
            if ring is not None:
                self.finish()
                ring.forget()
                self._of = {t: streamed for t, streamed in self._of.items() if streamed.ring is not ring}
            self._rings[device] = WeightRing(device, size)

    def keep_only(self, states: Collection[Mapping[str, Any]]) -> None:
        """Let go of states that the optimizer has no longer, once they are more than those it has."""
        if len(self._of) <= 2 * len(states):
            return
        alive = {state["state1"] for state in states if "state1" in state}
        for key in [key for key in self._of if key not in alive]:
            streamed = self._of.pop(key)
            streamed.ring.drop(streamed)

    @contextmanager
    def lent(self, state: Mapping[str, Any], device: torch.device) -> Iterator[list[Tensor]]:
        """A state's four tensors on the device, to be changed there; they go back at the end."""
        tensors = [state[name] for name in CODED]
        streamed = self._of.get(tensors[0])
        if streamed is None or any(a is not b for a, b in zip(streamed.sources, tensors, strict=True)):
            streamed = self._of[tensors[0]] = Streamed(self._rings[device], *tensors)
        yield streamed.ring.take(streamed)
        streamed.ring.write_back(streamed)

    def finish(self) -> None:
        """Let the host wait until every state is in the machine's memory."""
        for streamed in self._of.values():
            streamed.finish()

    def forget(self) -> None:
        """Let go of all states: others will be in their place."""
        self.finish()
        for ring in self._rings.values():
            ring.forget()
        self._of.clear()
