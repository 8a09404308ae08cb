"""What each method trains, as far as its memory depends on it: the recipes of a rehearsed step."""

from __future__ import annotations

from typing import Any

from torch import nn

from .rehearsal import ATTENTION_LAYERS, TEXT_LAYERS, Recipe, Rehearsal


def _whole_unet(r: Rehearsal) -> list[nn.Parameter]:
    trained = list(r.unet.requires_grad_(True).parameters())
    if r.options.get("text_encoder"):
        for encoder in r.encoders:
            trained += [p for n, p in encoder.requires_grad_(True).named_parameters() if "final_layer_norm" not in n]
    return trained


def _attention_lora(r: Rehearsal) -> list[nn.Parameter]:
    names = [f"{b}.{attention}.{layer}" for b in r.unet.attention_names() for attention in ("attn1", "attn2")
             for layer in ATTENTION_LAYERS]  # fmt: skip
    return [p for name in names for p in r.residual(name, r.options["rank"])]


def _text_keys_and_values(r: Rehearsal) -> list[nn.Parameter]:
    blocks = [r.unet.get_submodule(name).attn2 for name in r.unet.attention_names()]
    if r.options["mode"] == "crossattn":
        layers = [m for attn2 in blocks for m in (attn2.to_q, attn2.to_k, attn2.to_v, attn2.to_out[0])]
        return [r.master(m, name) for m in layers for name, _ in list(m.named_parameters(recurse=False))]
    return [r.master(m) for attn2 in blocks for m in (attn2.to_k, attn2.to_v)]


def _output_projections(r: Rehearsal) -> list[nn.Parameter]:
    names = [f"{n}.proj_out" for n, m in r.unet.layers().items() if hasattr(m, "proj_out")]
    ranks = [max(1, round(r.options["rank_ratio"] * r.unet.get_submodule(n).weight.shape[0])) for n in names]
    return [p for name, rank in zip(names, ranks, strict=True) for p in r.residual(name, rank)]


def _text_lora(r: Rehearsal) -> list[nn.Parameter]:
    layers = ("fc2",) if r.options["variant"] == "causal" else TEXT_LAYERS
    return r.text_residuals(layers, 1 if r.options["variant"] == "causal" else r.options["rank"])


def _nothing_else(r: Rehearsal) -> list[nn.Parameter]:
    return []


RECIPES: dict[str, Recipe] = {
    "dreambooth": Recipe(_whole_unet, batch=1, prior=1, in_backward=True, options={"text_encoder": False}),
    "dreambooth_lora": Recipe(_attention_lora, batch=1, prior=1, options={"rank": 4}),
    "custom_diffusion": Recipe(
        _text_keys_and_values, batch=1, prior=1, text=True, options={"mode": "kv", "train_token": True}
    ),
    "personalized_residuals": Recipe(
        _output_projections, batch=4, options={"rank_ratio": 0.05, "train_token": False}
    ),
    "textboost": Recipe(
        _text_lora, batch=8, text=True, frozen_text_too=True,
        options={"rank": 4, "variant": "lora", "train_token": True, "augmentation_rows": 12},
    ),
    "textual_inversion": Recipe(_nothing_else, batch=4, text=True, options={"train_token": True}),
}  # fmt: skip


def recipe_of(method: str, options: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """A method's recipe and its options with the defaults filled in; one sentence on what is unknown."""
    if method not in RECIPES:
        raise ValueError(f"the method {method!r} is unknown; choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[method]
    for name in options:
        if name not in recipe.options:
            known = ", ".join(recipe.options)
            raise ValueError(f"{name!r} does not change the memory of {method}; the options that do are {known}")
    return recipe, recipe.options | options
