"""A model without contents: networks of the right shapes and dtypes, on which a method's own setup works."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from pcs_kernels import WeightRing

from ..data.prompts import Vocabulary
from ..model.quiet import quiet
from ..unet.int8 import expect_8_bits
from ..unet.streaming import ring_bytes, stream
from ..unet.unet import UNet
from .networks import Networks


class BlankModel:
    """What a method's setup reads of a Model. The text encoders are made when first asked for, and only then counted.

    Args:
        networks: the configurations.
        dtype: of every weight, as a real model is loaded for training.
        device: "meta" and a fake device hold shapes alone; a real one small numbers.
        wanted_by: the method, for the sentence where no text encoder is known.
        weights: how the UNet's frozen weights are held.
        resident: where they are; "streamed" on a real device alone.
    """

    name = "this model"
    embedded = False

    def __init__(
        self,
        networks: Networks,
        dtype: torch.dtype,
        device: str,
        wanted_by: str,
        weights: str = "full",
        resident: str = "device",
    ) -> None:
        self.networks, self.dtype, self.device, self.wanted_by = networks, dtype, device, wanted_by
        streamed = resident == "streamed"
        self.unet = filled(UNet.from_config(networks.unet, device="meta"), dtype, "cpu" if streamed else device)
        if weights == "int8":
            expect_8_bits(self.unet)
        if streamed:
            stream(self.unet, WeightRing(device, ring_bytes(self.unet)))

    @functools.cached_property
    def text_encoders(self) -> list[nn.Module]:
        """One for SD1.x and SD2.x, two for SDXL."""
        if not self.networks.text:
            fix = 'give a whole model, or {"unet": {...}, "text_encoder": {...}}'
            raise ValueError(f"{self.wanted_by} works on the text encoder, and none is known for this UNet; {fix}")
        return [filled(text_encoder(config), self.dtype, self.device) for config in self.networks.text]

    @property
    def text_encoder(self) -> nn.Module:
        """The first text encoder."""
        return self.text_encoders[0]

    def release(self, *_parts: str) -> None:
        """Nothing is read from files, so nothing is let go."""


class BlankVocabulary(Vocabulary):
    """Token embeddings [count, width] of zeros: a learned word has the right shape whatever it starts from."""

    def __init__(self, networks: Networks, device: str, token_vectors: int) -> None:
        self.widths = [config["hidden_size"] for config in networks.text]
        self.device, self.token_vectors = device, token_vectors

    def rare(self, seed: int) -> str:
        """Any word does."""
        return f"rare-{seed}"

    def rows(self, text: str, count: int = 0) -> list[Tensor]:
        """`count` embeddings, or as many as the settings give a word: how many pieces `text` has is not known."""
        del text
        return [torch.zeros(count or self.token_vectors, width, device=self.device) for width in self.widths]


def filled(network: Any, dtype: torch.dtype, device: str) -> Any:
    """The network in a dtype on a device, frozen, with small numbers in it."""
    for module in network.modules():  # lists: the module changes while they are walked
        for name, p in list(module.named_parameters(recurse=False)):
            value = torch.empty(p.shape, dtype=dtype, device=device)
            value = value.fill_(0.01) if p.dim() < 2 else value.normal_(0, (p.numel() / p.shape[0]) ** -0.5)
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            places = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
            module.register_buffer(name, places, persistent=False)  # CLIP's one buffer holds the places
    return network.eval()


@quiet("transformers")
def text_encoder(config: dict[str, Any]) -> nn.Module:
    """transformers' text model of a configuration, on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    projects = (config.get("architectures") or [""])[0] == "CLIPTextModelWithProjection"
    kind: Any = CLIPTextModelWithProjection if projects else CLIPTextModel
    with torch.device("meta"):
        network: nn.Module = kind(CLIPTextConfig(**config))
    return network


def weights(network: nn.Module) -> int:
    """The number of a network's parameters."""
    return sum(p.numel() for p in network.parameters())
