"""Cross-attention maps of words, collected while images are sampled.

Letters: S steps, P images, G words, N = h x w image positions of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Maps:
    """Where each word was attended to, on the CPU.

    tokens: the words, G of them; mean: [P, G, h, w] over steps and layers; steps: [S, P, G, h, w] in float16.
    """

    tokens: list[str]
    mean: Tensor
    steps: Tensor

    @staticmethod
    def joined(parts: Sequence[Maps]) -> Maps:
        """The maps of one batch after the other."""
        if not parts:
            return Maps([], torch.zeros(0, 0, 0, 0), torch.zeros(0, 0, 0, 0, 0))
        return Maps(parts[0].tokens, torch.cat([p.mean for p in parts]), torch.cat([p.steps for p in parts], dim=1))


class MapTaker:
    """Collects the maps of one batch, step by step, at the latents' size.

    Args:
        tokens: the words.
        first: captured groups before theirs, which are LAG's.
        size: height and width of the latents.
    """

    def __init__(self, tokens: Sequence[str], first: int, size: tuple[int, int]) -> None:
        self.tokens, self.first, self.size = list(tokens), first, size
        self.total = torch.zeros(())
        self.steps: list[Tensor] = []  # in float16

    def take(self, found: Mapping[str, Tensor], pictures: int) -> None:
        """Add one step's mean over the layers, of the last `pictures` of the batch: the half with prompt."""
        layers = [m[-pictures:, self.first :] for m in found.values() if m.shape[1] > self.first]
        by_size: dict[int, list[Tensor]] = {}
        for m in layers:
            by_size.setdefault(m.shape[-1], []).append(m)
        total = reduce(torch.add, (self._upsampled(torch.stack(same).sum(0)) for same in by_size.values()))
        mean = (total / len(layers)).cpu()  # [P, G, h, w]
        self.total = self.total + mean
        self.steps.append(mean.half())

    def _upsampled(self, maps: Tensor) -> Tensor:
        image = maps.unflatten(-1, level_size(self.size, maps.shape[-1])).float()  # [P, G, h, w] of the level
        return F.interpolate(image, size=self.size, mode="bilinear", align_corners=False)

    def maps(self) -> Maps:
        """What was collected."""
        return Maps(self.tokens, self.total / len(self.steps), torch.stack(self.steps))


def level_size(size: tuple[int, int], positions: int) -> tuple[int, int]:
    """Height and width of the UNet's level that has so many positions: each level halves, rounding up."""
    height, width = size
    while height * width > positions:
        height, width = -(-height // 2), -(-width // 2)
    return height, width
