"""Types of other libraries' networks: what this package uses of them. For annotations; nothing here is ever built."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class TextEncoder(nn.Module):
    """transformers' CLIPTextModel or CLIPTextModelWithProjection."""

    config: Any

    def get_input_embeddings(self) -> nn.Embedding:
        raise NotImplementedError


class Autoencoder(nn.Module):
    """diffusers' AutoencoderKL."""

    config: Any

    def encode(self, x: Tensor) -> Any:
        raise NotImplementedError

    def decode(self, z: Tensor) -> Any:
        raise NotImplementedError
