"""What memory accesses cost: 32-byte sectors of a request, passes over the banks of shared memory.

A request is one instruction of one warp. Ideal: global memory moves no more sectors than its bytes fill; shared
memory, 32 banks of 4 bytes, serves 128 bytes a pass.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from .numbers import Array

SECTOR, BANKS, LANES = 32, 32, 32


@dataclass
class Cost:
    requests: int = 0
    done: int = 0  # sectors, or passes
    ideal: int = 0

    @property
    def ratio(self) -> float:
        return self.done / self.ideal if self.ideal else 1.0


@dataclass
class Traffic:
    """By kind of access, "global load 16" and the like: the number is its bytes a thread."""

    costs: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))

    def note_global(self, kind: str, address: Array, active: Array, width: int) -> None:
        """`address`, `active`: [warps, 32]."""
        cost = self.costs[f"global {kind} {width}"]
        sectors = _distinct(address // SECTOR, active)
        places = _distinct(address, active)
        busy = places > 0
        cost.requests += int(busy.sum())
        cost.done += int(sectors.sum())
        cost.ideal += int((-(-places[busy] * width // SECTOR)).sum())

    def note_shared(self, kind: str, address: Array, active: Array, width: int) -> None:
        """A warp's lanes go together while they ask for no more than 128 bytes: 32, 16 or 8 at once."""
        cost = self.costs[f"shared {kind} {width}"]
        together = LANES * 4 // max(width, 4)
        address, active = address.reshape(-1, together), active.reshape(-1, together)
        address, active = address[active.any(-1)], active[active.any(-1)]
        if not len(address):
            return
        words = address[..., None] // 4 + np.arange(max(width // 4, 1))
        active = np.broadcast_to(active[..., None], words.shape)
        words = np.where(active, words, -1).reshape(len(words), -1)
        words.sort(-1)
        first = np.ones(words.shape, bool)
        first[:, 1:] = words[:, 1:] != words[:, :-1]
        first &= words >= 0
        row = np.broadcast_to(np.arange(len(words))[:, None], words.shape)
        passes = np.zeros((len(words), BANKS), np.int64)
        np.add.at(passes, (row[first], words[first] % BANKS), 1)
        cost.requests += len(words)
        cost.done += int(passes.max(-1).sum())
        cost.ideal += len(words)


def _distinct(values: Array, active: Array) -> Array:
    """How many different values each row has among its active ones."""
    rows = np.sort(np.where(active, values, -1), -1)
    first = np.ones(rows.shape, bool)
    first[:, 1:] = rows[:, 1:] != rows[:, :-1]
    return (first & (rows >= 0)).sum(-1)
