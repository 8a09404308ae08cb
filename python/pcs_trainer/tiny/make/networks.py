"""The text encoder, the UNet and the noise schedule of the embedded model, as diffusers and transformers build them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...unet.unet import UNet
from ..tokenizer import MAX_TOKENS

TEXT_WIDTH = 128
UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (64, 96, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.02,  # almost pure noise at the end: sampling starts from noise alone
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}


def build_text_encoder(tokenizer: Any) -> Any:
    """transformers' CLIPTextModel with first weights, for a tokenizer's vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    config: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 384,
        "projection_dim": TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": "quick_gelu",
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
        "attn_implementation": "eager",
    }
    return CLIPTextModel(CLIPTextConfig(**config))


def build_unet() -> Any:
    """diffusers' UNet: the first weights come from it, and the finished folder is written by it."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET)


def build_own_unet() -> UNet:
    """The package's UNet on its own kernels, with diffusers' first weights: a fifth faster to train on two cores."""
    peer = build_unet()
    unet = UNet.from_config(dict(peer.config))
    unet.load_state_dict(peer.state_dict())
    return unet


def alphas() -> Tensor:
    """The cumulative product of (1 - beta) of the scaled-linear schedule, float32 [1000]."""
    ends = (SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5)
    betas = torch.linspace(*ends, SCHEDULE["num_train_timesteps"], dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def loaded_parts(folder: Path) -> list[Any]:
    """Text encoder, UNet and autoencoder of a finished folder, as diffusers' modules in fp32."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    kinds = ((CLIPTextModel, "text_encoder"), (UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    return [kind.from_pretrained(folder, subfolder=name).float().eval() for kind, name in kinds]
