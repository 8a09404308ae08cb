"""One training step of Personalized Residuals on a small UNet, all of it through compiled kernels."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from pcs_trainer.memory.networks import networks_of
from pcs_trainer.memory.rehearsal import Rehearsal
from pcs_trainer.methods import settings_for
from torch import Tensor

import pcs_kernels

from .launcher import Gpu, device

SMALL = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SIDE, TOKENS, TIME = 12, 7, 400


@dataclass
class Step:
    """The same network, trained values and picture for every backend and precision."""

    network: Rehearsal
    picture: Tensor
    noise: Tensor
    text: Tensor

    @classmethod
    def make(cls, dtype: torch.dtype) -> Step:
        torch.manual_seed(0)
        settings = settings_for(None, "personalized_residuals")
        network = Rehearsal(networks_of({"unet": SMALL}), settings, (1, SIDE), dtype, "cpu", counted=False)
        with torch.no_grad():
            for p in network.trained:  # a fresh residual's second half is zero, and so is the first half's gradient
                p.normal_(std=0.1)
        picture, noise = torch.randn(2, 1, network.channels, SIDE, SIDE)
        return cls(network, picture.to(dtype), noise, torch.randn(1, TOKENS, network.width).to(dtype))

    def gradient(self, backend: str, dtype: torch.dtype) -> Tensor:
        """Of everything that trains, in one vector."""
        network = copy.deepcopy(self.network)
        unet = network.unet if dtype == network.dtype else network.unet.to(dtype)
        with pcs_kernels.backend(backend):
            text = unet.text_kv(self.text.to(dtype))
            error = unet(self.picture.to(dtype), torch.tensor([TIME]), text, None).float() - self.noise
            error.square().mean().backward()
        gradients = [p.grad for p in network.trained]
        assert gradients and all(g is not None for g in gradients)
        return torch.cat([g.double().flatten() for g in gradients])

    def compiled(self, dtype: torch.dtype, architecture: int) -> tuple[Tensor, Gpu]:
        with device(architecture) as gpu:
            return self.gradient("triton", dtype), gpu
