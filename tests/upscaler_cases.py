"""A small up-scaler with random weights in diffusers' layout, on the embedded model's text encoder and autoencoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from pcs_trainer.model.sources import TINY
from unet_families import UPSCALER, peer

UNET = UPSCALER | {"in_channels": 11, "out_channels": 8, "cross_attention_dim": 128, "layers_per_block": 1}


def write_upscaler(root: Path) -> Path:
    """The folder of a model that enlarges 16 x 16 pixels to 64 x 64."""
    from diffusers import DDPMScheduler

    for name in ("text_encoder", "tokenizer", "vae", "scheduler"):
        shutil.copytree(TINY / name, root / name)
    torch.manual_seed(0)
    network = peer(UNET)
    with torch.no_grad():
        network.conv_out.weight.mul_(0.3)  # predictions of about the size of real ones
    network.save_pretrained(root / "unet")
    DDPMScheduler(beta_start=1e-4, beta_end=0.02).save_pretrained(root / "low_res_scheduler")
    index = {"_class_name": "StableDiffusionUpscalePipeline", "max_noise_level": 350}
    (root / "model_index.json").write_text(json.dumps(index))
    return root
