"""Small configurations of each family of UNet, the real ones, and diffusers' own network beside ours."""

from __future__ import annotations

import torch
from pcs_trainer.unet.unet import UNet

from benchmarks import registry

SMALL = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SD2 = SMALL | {"use_linear_projection": True, "attention_head_dim": [2, 4, 4], "upcast_attention": True}
SDXL = SD2 | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 3],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
}
# As the public x4 up-scaler: the first attention of all blocks but the deepest is over the text as well.
UPSCALER = SD2 | {
    "in_channels": 7,
    "num_class_embeds": 1000,
    "attention_head_dim": 4,
    "block_out_channels": (32, 32, 64, 64),
    "only_cross_attention": (True, True, True, False),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
FAMILIES = {
    "sd1": SMALL,
    "sd2": SD2,
    "sdxl": SDXL,
    "inpainting": SMALL | {"in_channels": 9},
    "low resolution": SMALL | {"in_channels": 7, "num_class_embeds": 10},
    "up-scaler": UPSCALER,
}

# The public x4 up-scaler's, by Stability's x4-upscaling.yaml.
X4_REAL = {
    "in_channels": 7,
    "block_out_channels": [256, 512, 512, 1024],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "only_cross_attention": [True, True, True, False],
    "num_class_embeds": 1000,
    "cross_attention_dim": 1024,
    "attention_head_dim": 8,
    "use_linear_projection": True,
    "sample_size": 128,
}
SD15_REAL, SD21_REAL, SDXL_REAL = registry.SD15, registry.SD21, registry.SDXL


def peer(config: dict):
    """diffusers' network with weights that make every part matter: no flat attention, no idle norm."""
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(**config)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.dim() == 1:
                p.normal_(float("norm" in name and "weight" in name), 0.2)
            elif "to_q" in name or "to_k" in name:
                p.mul_(4)
    return network


def ours_like(network) -> UNet:
    """Our network on copies of the peer's weights."""
    unet = UNet.from_config(dict(network.config), device="meta")
    unet.load_state_dict({k: v.detach().clone() for k, v in network.state_dict().items()}, strict=True, assign=True)
    return unet


def inputs(config: dict, batch: int = 2, size: int = 16, text: int = 7) -> tuple[torch.Tensor, ...]:
    """(x, t, context, added) for a configuration."""
    x = torch.randn(batch, config.get("in_channels", 4), size, size)
    t = torch.tensor([3, 700, 31, 999])[:batch]
    added = {}
    if config.get("addition_embed_type"):
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        added = {"text_embeds": torch.randn(batch, pooled), "time_ids": torch.randint(0, 512, (batch, 6))}
    if config.get("num_class_embeds"):
        added = {"class_labels": torch.arange(batch)}
    return x, t, torch.randn(batch, text, config["cross_attention_dim"]), added


def peer_prediction(network, x, t, context, added):
    added = dict(added)
    labels = added.pop("class_labels", None)
    return network(x, t, context, class_labels=labels, added_cond_kwargs=added or None).sample


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|, in float64."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()
