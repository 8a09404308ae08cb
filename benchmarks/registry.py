"""The shapes that the benchmarks use: the real UNets, and layers of them named by where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pcs_trainer.methods import TITLES

# What differs from diffusers' defaults.
SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD21: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def measured(first: tuple[str, ...], left_out: Mapping[str, str]) -> tuple[str, ...]:
    """The methods that a benchmark measures: `first` in this order, then every other one that is not left out.

    Args:
        first: names in `pcs_trainer.methods.TITLES`, in the order of the results.
        left_out: name -> why it is not measured.
    """
    return (*first, *(name for name in TITLES if name not in first and name not in left_out))


@dataclass(frozen=True)
class Attention:
    name: str
    batch: int
    heads: int
    queries: int
    tokens: int
    width: int


@dataclass(frozen=True)
class Picture:
    name: str
    batch: int
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Rows:
    name: str
    rows: int
    inputs: int
    outputs: int
    rank: int = 0


@dataclass(frozen=True)
class Conv:
    name: str
    batch: int
    inputs: int
    outputs: int
    size: int


SELF_ATTENTION = (
    Attention("sd15 512 level 0", 1, 8, 4096, 4096, 40),
    Attention("sd15 512 level 1", 1, 8, 1024, 1024, 80),
    Attention("sd15 512 level 2", 1, 8, 256, 256, 160),
    Attention("sdxl 1024 level 2", 1, 20, 1024, 1024, 64),
)
CROSS_ATTENTION = (
    Attention("sd15 512 level 0", 1, 8, 4096, 77, 40),
    Attention("sd15 512 level 1", 1, 8, 1024, 77, 80),
    Attention("sd15 512 level 2", 1, 8, 256, 77, 160),
    Attention("sdxl 1024 level 1", 1, 10, 4096, 77, 64),
)
GROUP_NORM = (
    Picture("sd15 512 level 0", 1, 320, 64, 64),
    Picture("sd15 512 up level 0", 1, 960, 64, 64),
    Picture("sd15 512 level 2", 1, 1280, 16, 16),
)
GEGLU = (
    Rows("sd15 512 level 0", 4096, 320, 1280),
    Rows("sd15 512 level 1", 1024, 640, 2560),
    Rows("sd15 512 level 2", 256, 1280, 5120),
)
LOWRANK = (
    Rows("sd15 512 level 0", 4096, 320, 320, 16),
    Rows("sd15 512 level 1", 1024, 640, 640, 32),
    Rows("sd15 512 level 2", 256, 1280, 1280, 64),
)
CONV = (
    Conv("sd15 512 mid up", 1, 2560, 1280, 8),
    Conv("sd15 512 level 2", 1, 1280, 1280, 16),
    Conv("sd15 512 level 0", 1, 320, 320, 64),
)
ADAMW = (Rows("20 M parameters", 20_000_000, 1, 1),)
