"""Custom Diffusion (arXiv 2212.04488): the text's keys and values learn the subject, and a new word V* names it.

Trains   attn2.to_k and attn2.to_v of every block and the row of V*, which starts from a rare word's (section 3.1);
         variant="crossattn": all of attn2, advised for faces. Keys and values at the first token get no gradient.
Data     pictures at random sizes, small ones pasted on grey with a mask and "very small" or "far away" in front of the
         prompt, large ones cropped with "zoomed in" or "close up"; and 200 captioned pictures of the class.
Loss     sum(mask err^2) / sum(mask) a picture on the subject + the same without a mask on the class.
Default  250 steps (joint: 500), batch 8, 8e-5 a step. Several subjects can train together: one word each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..data import augment
from . import Learner, add_words, subject_rows, train_weights

if TYPE_CHECKING:
    from ..model.model import Model
    from ..settings import Settings
    from ..unet.blocks import TextKV

VARIANTS = {"kv": ("attn2.to_k.", "attn2.to_v."), "crossattn": ("attn2.",)}


def setup(model: Model, s: Settings) -> Learner:
    if s.variant not in VARIANTS:
        raise ValueError(f"custom_diffusion has the variants {', '.join(VARIANTS)}, not {s.variant!r}")
    learner = Learner({}, lambda: {})
    chosen = {
        f"unet.{name}": parameter
        for name, parameter in model.unet.named_parameters()
        if any(part in name for part in VARIANTS[s.variant])
    }
    train_weights(chosen, learner, masters=True)
    add_words(learner, subject_rows(model, s), s.train_token)
    learner.tensors = lambda: {n: p.detach().clone() for n, p in chosen.items()}
    return learner


def without_first_gradient(kv: TextKV) -> TextKV:
    """Keys and values whose first token is a constant."""

    def held(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1].detach(), x[:, 1:]], dim=1)

    return {name: (held(k), held(v)) for name, (k, v) in kv.items()}


def augmented(pixels: np.ndarray, size: int, latent: int, s: Settings, generator: torch.Generator) -> augment.Augmented:
    return augment.custom_diffusion(pixels, size, latent, generator)
