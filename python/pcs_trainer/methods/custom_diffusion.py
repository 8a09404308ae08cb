"""Custom Diffusion (arXiv 2212.04488): the text's keys and values learn the subject, and a new word V* names it.

Trains   attn2.to_k and attn2.to_v of every block and the embedding of V*, which starts from a rare word's (3.1);
         variant="crossattn": all of attn2, advised for faces. Keys and values at the first token get no gradient.
Data     pictures at random sizes, small ones pasted on grey with a mask and "very small" or "far away" in front of the
         prompt, large ones cropped with "zoomed in" or "close up"; and 200 captioned class images. Half of both are
         mirrored.
Loss     sum(mask err^2) / sum(mask) a picture on the subject + the same without a mask on the class.
Default  250 steps (joint: 500), batch 4 + 4, 8e-5 a step: the paper's 8 pictures include the class images, as its code
         mixes half of each into a batch. Several subjects can train together: one word each, each with class images
         of its own. The authors sample with guidance 6, ddim, eta 1, 100 steps (`pcs sample --preset`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..concept import grammar
from ..data import augment
from ..data.augment import Augmentation
from ..model.model import Model
from ..settings import Settings
from ..unet.blocks import TextKV
from ..unet.int8 import own_parameters
from .learner import Learner
from .method import Method

PARAMETERS = {"kv": ("attn2.to_k.", "attn2.to_v."), "crossattn": ("attn2.",)}  # by variant: parts of their names

# The authors' advice for faces.
FACES = dict(variant="crossattn", learning_rate=5e-6, steps=750, augment=False)


@dataclass(kw_only=True)
class CustomDiffusion(Settings):
    """The paper's values."""

    train_token: bool = True
    template: str | tuple[str, ...] = "photo of a {subject}"
    class_template: str = "photo of a {class}"
    steps: int = 250
    batch: int = 4  # and as many class images: 8 in all
    learning_rate: float = 8e-5
    prior_weight: float = 1.0
    prior_images: int = 200
    variant: Literal["kv", "crossattn"] = "kv"  # what trains: keys and values, or all of cross-attention
    flip: bool = True
    augment: bool = True  # photos at random sizes, named in the prompt
    bank: int = 256  # augmented pictures prepared before training; the autoencoder leaves memory after that


def setup(model: Model, s: CustomDiffusion, learner: Learner) -> None:
    """The variant's parameters in float32, and the subject's word."""
    for name, parameter in own_parameters(model.unet):
        if any(part in name for part in PARAMETERS[s.variant]):
            learner.train_value(grammar.value_name("unet", name), parameter, master=True)
    learner.add_subject_word(s)


def without_first_gradient(kv: TextKV) -> TextKV:
    """Keys and values whose first token is a constant."""

    def held(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1].detach(), x[:, 1:]], dim=1)

    return {name: (held(k), held(v)) for name, (k, v) in kv.items()}


METHOD = Method(
    settings=CustomDiffusion,
    setup=setup,
    paper="https://arxiv.org/abs/2212.04488",
    trains="the keys and values of the text in every cross-attention, and a new word",
    choose="several subjects in one picture: train them jointly, or `merge` afterwards",
    # 64 pixels cannot draw the grey margins that augmentation makes, and learn less with them.
    tiny={
        "steps": 700,
        "batch": 2,
        "learning_rate": 2e-3,
        "token_learning_rate": 2e-2,
        "prior_images": 32,
        "flip": False,
        "augment": False,
    },
    presets={"faces": FACES},
    augment=lambda s: Augmentation(augment.custom_diffusion, s.bank) if s.augment else None,
    hold_text=without_first_gradient,
)
