"""NVIDIA's cards by their data sheets, and what a counted step takes at their full rates."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """A card's rates, which no kernel quite reaches.

    Args:
        name: as people say it.
        memory: GB.
        products: dense 10^12 FLOP/s of 16-bit products that are summed in float32.
        bandwidth: of its memory, in GB/s.
        link: from the machine's memory, in GB/s in one direction.
        bfloat16: whether it has bfloat16 products; float16 otherwise.
    """

    name: str
    memory: int
    products: float
    bandwidth: float
    link: float
    bfloat16: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """What suits it for training."""
        return torch.bfloat16 if self.bfloat16 else torch.float16

    def seconds(self, calls: Iterable[tuple[float, float]]) -> float:
        """Calls of (FLOPs, bytes) one after the other, each at the slower of the two rates."""
        flops, moved = self.products * 1e12, self.bandwidth * 1e9
        return sum(max(work / flops, size / moved) for work, size in calls)


CARDS = (
    Card("T4", 16, 65, 320, 15.8, bfloat16=False),
    Card("RTX 2060", 6, 25.8, 336, 15.8, bfloat16=False),
    Card("RTX 3050", 8, 18.2, 224, 15.8),
    Card("RTX 3060", 12, 25.6, 360, 31.5),
    Card("RTX 3060 Ti", 8, 32.4, 448, 31.5),
    Card("RTX 3070", 8, 40.6, 448, 31.5),
    Card("RTX 3080", 10, 59.5, 760, 31.5),
    Card("RTX 3090", 24, 71, 936, 31.5),
    Card("RTX 4060", 8, 30.2, 272, 15.8),
    Card("RTX 4060 Ti", 8, 44.1, 288, 15.8),
    Card("RTX 4070", 12, 58.3, 504, 31.5),
    Card("RTX 4080", 16, 97.5, 717, 31.5),
    Card("RTX 4090", 24, 165.2, 1008, 31.5),
    Card("A100", 80, 312, 2039, 31.5),
    Card("H100", 80, 989.4, 3350, 63),
)


def card_named(name: str) -> Card:
    """A card by its name, with or without RTX, spaces and capitals; ValueError with the nearest where there is none."""
    known = {_plain(card.name): card for card in CARDS}
    found = known.get(_plain(name))
    if found is None:
        near = difflib.get_close_matches(_plain(name), known, 1)
        hint = f"did you mean {known[near[0]].name}?" if near else f"known are {', '.join(c.name for c in CARDS)}"
        raise ValueError(f"there is no data sheet of the card {name!r}; {hint}")
    return found


def _plain(name: str) -> str:
    found = name.lower().replace(" ", "").replace("-", "")
    for brand in ("nvidia", "geforce", "rtx"):
        found = found.removeprefix(brand)
    return found
