"""TextBoost (arXiv 2409.08248): one picture, learned by the text encoder alone.

Trains   rank-4 LoRA (alpha = rank) on the text encoder's q, k, v, out, fc1, fc2; V*, which starts from the class word;
         and 12 rows of words that name what was done to the picture ("<aug-crop> photo of V*"), so that it is not
         learned as part of V*. UNet and autoencoder are frozen.
Loss     noise MSE at timesteps p(t) ~ max log SNR - log SNR(t)
         + 0.1 mean(1 - cos(h_tuned, h_frozen)) over all positions of general captions (knowledge preservation).
Held     the first token and the empty prompt stay as the frozen encoder's; rows are no longer than the table's mean.
Default  250 steps, batch 8, LoRA 1e-4, rows 1e-3.

variant="causal" is the second version: a rank-1 residual on fc2 for the tokens from V* on, so that what stands before
V* is untouched; "causal++" adds one on the text states of each cross-attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..concept.captions import general_captions
from ..data import augment
from ..data.prompts import class_prompt, first_rows
from ..model.text import TextLowRank, attach_context, attach_text, detach_text, encode, text_module, without_adapters
from ..training.losses import preservation_loss
from . import Learner, add_words, subject_rows
from .dreambooth import fresh_pair

if TYPE_CHECKING:
    from ..model.model import Model
    from ..settings import Settings

LAYERS = {
    "v1": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "causal": ("mlp.fc2",),
    "causal++": ("mlp.fc2",),
}
PARTS = ("text_encoder", "text_encoder_2")


def setup(model: Model, s: Settings) -> Learner:
    if s.variant not in LAYERS:
        raise ValueError(f"textboost has the variants {', '.join(LAYERS)}, not {s.variant!r}")
    learner = Learner({}, lambda: {}, text_trains=True, hold_first=True)
    pairs = encoder_residuals(model, s, learner)
    if s.variant == "causal++":
        pairs |= context_residuals(model, s)
    learner.undo += [lambda e=encoder: detach_text(e, "learning") for encoder in model.text_encoders]
    learner.parameters |= pairs
    add_words(learner, subject_rows(model, s), s.train_token)
    if s.augment:
        starts = {augment.word(n): first_rows(model, text, count) for n, (text, count) in augment.WORDS.items()}
        add_words(learner, starts, s.train_token)
        learner.seldom = tuple(n for n in learner.parameters if n.startswith("word.") and "<aug-" in n)
    learner.tensors = lambda: {n: p.detach().clone() for n, p in pairs.items()}
    return learner


def encoder_residuals(model: Model, s: Settings, learner: Learner) -> dict[str, nn.Parameter]:
    """A pair on each of the variant's layers; the causal ones reach the tokens from V* on."""
    generator = torch.Generator().manual_seed(s.seed)
    causal = s.variant.startswith("causal")
    pairs = {}
    for part, encoder in zip(PARTS, model.text_encoders, strict=False):
        # SDXL reads the states before the last layer; what its pooled text goes through is the second encoder's alone.
        unread = len(model.text_encoders) > 1 and not hasattr(encoder, "text_projection")
        for number in range(encoder.config.num_hidden_layers - unread):
            for layer in LAYERS[s.variant]:
                name = f"text_model.encoder.layers.{number}.{layer}"
                down, up = fresh_pair(text_module(encoder, name), 1 if causal else s.rank, s.init, generator)
                attach_text(encoder, name, TextLowRank(down, up, 1.0, "learning", s.token if causal else ""))
                prefix = "causal_" if causal else ""
                pairs |= {f"{part}.{name}.{prefix}down": down, f"{part}.{name}.{prefix}up": up}
    return pairs


def context_residuals(model: Model, s: Settings) -> dict[str, nn.Parameter]:
    """A rank-1 pair on the text states in front of each cross-attention's keys and values."""
    generator = torch.Generator().manual_seed(s.seed + 1)
    pairs = {}
    for block in model.unet.attention_names():
        width = model.unet.settings["cross_attention_dim"]
        down = nn.Parameter(torch.randn(1, width, generator=generator))
        up = nn.Parameter(torch.zeros(width, 1))
        attach_context(model.text_encoder, block, TextLowRank(down, up, 1.0, "learning", s.token))
        pairs |= {f"context.{block}.down": down, f"context.{block}.up": up}
    return pairs


def augmented(pixels: np.ndarray, size: int, latent: int, s: Settings, generator: torch.Generator) -> augment.Augmented:
    return augment.textboost(pixels, size, s.augment_probability, generator)


def bank(model: Model, s: Settings, count: int = 200) -> list[str]:
    """General captions: one in ten empty, one in ten the class prompt."""
    captions = general_captions(model, count)
    return ["" if i % 10 == 0 else class_prompt(s) if i % 10 == 1 else text for i, text in enumerate(captions)]


def extra_loss(model: Model, s: Settings, captions: list[str], generator: torch.Generator) -> Tensor:
    """lambda times the knowledge-preservation loss on some of the bank's captions."""
    pick = torch.randint(len(captions), (s.batch,), generator=generator).tolist()
    said = [captions[i] for i in pick]
    tuned = encode(model, said).states
    with torch.no_grad():
        frozen = _frozen_states(model, said)
    if isinstance(tuned, dict):
        return s.preservation_weight * torch.stack([preservation_loss(x, frozen) for x in tuned.values()]).mean()
    return s.preservation_weight * preservation_loss(tuned, frozen)


def _frozen_states(model: Model, said: list[str]) -> Tensor:
    from contextlib import ExitStack

    with ExitStack() as stack:
        for encoder in model.text_encoders:
            stack.enter_context(without_adapters(encoder))
        return encode(model, said).states  # type: ignore[return-value]


@torch.no_grad()
def after_step(model: Model, words: dict[str, list[Tensor]]) -> None:
    """Rows no longer than the mean row of the encoder's own table."""
    for e, encoder in enumerate(model.text_encoders):
        limit = _mean_norm(encoder)
        for rows in words.values():
            norm = rows[e].norm(dim=1, keepdim=True).clamp_min(1e-12)
            rows[e].mul_((limit / norm).clamp_max(1.0))


def _mean_norm(encoder: nn.Module) -> float:
    found = encoder.__dict__.get("_pcs_mean_norm")
    if found is None:
        found = encoder.__dict__["_pcs_mean_norm"] = float(encoder.get_input_embeddings().weight.norm(dim=1).mean())
    return found
