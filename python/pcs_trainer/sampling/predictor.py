"""The network as a sampler sees it: guidance, LAG's masks and attention maps in one forward of the UNet a step.

Letters: B images of a batch, C latent channels, h x w latent positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.text import Text
from ..unet.unet import UNet
from .lag import Attention, Masker
from .maps import MapTaker


class Predictor:
    """predict(x, t) of one batch: both halves of the guidance, the maps and the masks in one forward of the UNet."""

    def __init__(
        self,
        unet: UNet,
        text: Text,
        pixels: tuple[int, int],
        guidance: float,
        steps: int,
        attention: Attention,
        pictures: Sequence[int],
        latent_size: tuple[int, int],
    ) -> None:
        self.unet, self.guidance, self.steps, self.step = unet, guidance, steps, 0
        self.guided = guidance != 1.0
        self.kv = unet.text_kv(text.states)
        self.added = text.added(*pixels)
        self.small: Tensor | None = None
        self.lag = attention.lag
        self.capture = attention.of(pictures, self.guided)
        self.masker = None if attention.lag is None else Masker(attention.lag, attention.keys, self.guided)
        self.taker = MapTaker(attention.tokens, len(attention.keys), latent_size) if attention.tokens else None

    def reads(self, small: Tensor, labels: dict[str, Tensor]) -> None:
        """Give an up-scaler its small pictures [B, 3, h, w] and the classes [B] that say how noisy they are."""
        halves = 2 if self.guided else 1
        self.small = torch.cat([small] * halves).to(self.unet.conv_in.weight)  # [B or 2B, 3, h, w]
        self.added = (self.added or {}) | {name: torch.cat([label] * halves) for name, label in labels.items()}

    def __call__(self, x: Tensor, t: float) -> Tensor:
        weight = self.unet.conv_in.weight
        both = (torch.cat([x, x]) if self.guided else x).to(weight)  # [B or 2B, C, h, w]
        if self.small is not None:
            both = torch.cat([both, self.small], dim=1)  # [B or 2B, C + 3, h, w]
        masks = self.masker if self.lag is not None and self.lag.masks_at(self.step, self.steps) else None
        self.step += 1
        if masks is None and self.taker is None:
            said = self.unet(both, t, self.kv, self.added)
        else:
            said, maps = self.unet(both, t, self.kv, self.added, capture=self.capture, masks=masks)
            if self.taker is not None:
                self.taker.take(maps, len(x))
        said = said.to(x)
        if not self.guided:
            return said
        without, given = said.chunk(2)
        return without + self.guidance * (given - without)
