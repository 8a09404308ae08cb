"""What each method trains, as far as memory depends on it: shapes and dtypes, put on a rehearsal's networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from ..methods.custom_diffusion import VARIANTS as ATTENTION_PARTS
from ..methods.dreambooth import PROJECTIONS
from ..methods.personalized_residuals import SHARE
from ..settings import Settings

if TYPE_CHECKING:
    from .rehearsal import Rehearsal

Parameters = list[nn.Parameter]
AUGMENTATION_ROWS = 12  # of TextBoost's words for what was done to a picture


def whole_unet(r: Rehearsal) -> Parameters:
    return list(r.unet.requires_grad_(True).parameters()) + whole_text(r)


def whole_text(r: Rehearsal) -> Parameters:
    if not r.settings.train_text_encoder:
        return []
    return [p for encoder in r.encoders for p in encoder.requires_grad_(True).parameters()]


def attention_lora(r: Rehearsal) -> Parameters:
    names = [f"{block}.{attention}.{layer}" for block in r.unet.attention_names() for attention in ("attn1", "attn2")
             for layer in PROJECTIONS]  # fmt: skip
    return [p for name in names for p in r.residual(name, r.settings.rank)] + whole_text(r)


def text_keys_and_values(r: Rehearsal) -> Parameters:
    parts = ATTENTION_PARTS[r.settings.variant]
    names = [name for name, _ in r.unet.named_parameters() if any(part in name for part in parts)]
    return [r.master(name) for name in names]


def output_projections(r: Rehearsal) -> Parameters:
    names = [name for name, _ in r.unet.named_modules() if name.endswith(".proj_out")]
    widths = [r.unet.get_submodule(name).weight.shape[0] for name in names]
    ranks = [r.settings.rank or max(1, round(SHARE * width)) for width in widths]
    return [p for name, rank in zip(names, ranks, strict=True) for p in r.residual(name, rank)]


def text_lora(r: Rehearsal) -> Parameters:
    from ..methods.textboost import LAYERS

    return r.text_residuals(LAYERS[r.settings.variant], 1 if "causal" in r.settings.variant else r.settings.rank)


def rows_alone(r: Rehearsal) -> Parameters:
    return []


TRAINED: dict[str, Callable[[Rehearsal], Parameters]] = {
    "dreambooth": whole_unet,
    "dreambooth_lora": attention_lora,
    "custom_diffusion": text_keys_and_values,
    "personalized_residuals": output_projections,
    "textboost": text_lora,
    "textual_inversion": rows_alone,
}
# What of the settings a step's memory depends on.
FIELDS = ("method", "rank", "variant", "train_token", "token_vectors", "identifier", "train_text_encoder", "augment",
          "prior_weight", "preservation_weight", "optimizer", "step_in_backward", "clip_norm", "clip")  # fmt: skip


def trained_by(s: Settings) -> Callable[[Rehearsal], Parameters]:
    return TRAINED[s.method]


def n_rows(s: Settings) -> int:
    """Learned rows that train: the subject's word, and TextBoost's augmentation words."""
    if not s.train_token:
        return 0
    subject = s.token_vectors if s.identifier == "learned" else 0
    return subject + AUGMENTATION_ROWS * (s.method == "textboost" and s.augment)


def uses_text(s: Settings) -> bool:
    """Whether the text encoders are at work in every step."""
    return s.method == "textboost" or s.train_text_encoder or n_rows(s) > 0
