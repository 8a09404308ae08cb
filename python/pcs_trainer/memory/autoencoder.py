"""The autoencoder of a planned run: its bytes, and those that its work on some images makes."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..model.bands import in_bands
from ..model.quiet import quiet
from .blank import filled, weights
from .ledger import Ledger


def autoencoder_dtypes(config: dict[str, Any], dtype: torch.dtype, sdxl: bool) -> tuple[torch.dtype, torch.dtype]:
    """(encoding, decoding): one that asks for float32 has it in float16, and SDXL's encodes in it from bfloat16 too."""
    if not config.get("force_upcast", True) or dtype is torch.float32:
        return dtype, dtype
    float16 = dtype is torch.float16
    return torch.float32 if float16 or sdxl else dtype, torch.float32 if float16 else dtype


class Autoencoder:
    """An autoencoder without contents, and what its work on some images makes."""

    @quiet("diffusers", "transformers")
    def __init__(self, config: dict[str, Any], dtype: torch.dtype) -> None:
        from diffusers import AutoencoderKL

        self.fake = FakeTensorMode()
        with torch.device("meta"):
            network: Any = AutoencoderKL.from_config({"_class_name": "AutoencoderKL"} | config)
        with self.fake:
            self.network: Any = filled(network, dtype, "cpu")
        self.dtype, self.latent = dtype, self.network.config.latent_channels
        self.factor = 2 ** (len(self.network.config.block_out_channels) - 1)
        self.bytes = weights(self.network) * dtype.itemsize
        self._found: dict[tuple[str, int, int], int] = {}

    def encoding(self, images: int, size: int) -> int:
        """Bytes that encoding images of size x size makes at most."""
        return self._count("encode", images, (3, size))

    def decoding(self, images: int, size: int) -> int:
        """Bytes that decoding images of size x size makes at most."""
        return self._count("decode", images, (self.latent, size // self.factor))

    def _count(self, what: str, images: int, shape: tuple[int, int]) -> int:
        key = (what, images, shape[1])
        if key not in self._found:
            owned: list[Tensor] = [*self.network.parameters(), *self.network.buffers()]
            pixels = (shape[1] * (self.factor if what == "decode" else 1)) ** 2
            with torch.no_grad(), self.fake, in_bands(self.network, pixels), Ledger(owned) as ledger:
                x = torch.zeros(images, shape[0], shape[1], shape[1], dtype=self.dtype)
                made = getattr(self.network, what)(x)
                made.sample.float() if what == "decode" else made.latent_dist.std
            self._found[key] = ledger.result().peak
        return self._found[key]


@functools.lru_cache(maxsize=4)
def autoencoder(config: str, dtype: torch.dtype) -> Autoencoder:
    """The one of a configuration in JSON; asked again, the same, with what it has counted."""
    return Autoencoder(json.loads(config), dtype)
