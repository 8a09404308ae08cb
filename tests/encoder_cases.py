"""Small image encoders with random weights, as folders that transformers reads."""

from __future__ import annotations

from pathlib import Path

import torch


def write_clip(folder: Path) -> Path:
    """A CLIP model of 32 x 32 pixels with the embedded model's tokenizer."""
    from pcs_trainer.tiny.common import WEIGHTS
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    text = small | dict(vocab_size=len(tokenizer), max_position_embeddings=20, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(3)
    vision = small | dict(image_size=32, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
