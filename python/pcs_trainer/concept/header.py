"""The header fields that other tools read: modelspec.* and ss_*."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .concept import Concept

IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
FAMILIES = {  # family -> (architecture, the name that kohya's tools use)
    "sd1": ("stable-diffusion-v1", "sd_v1.x"),
    "sd2": ("stable-diffusion-v2-768-v", "sd_v2.x"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}


def described(concept: Concept) -> dict[str, str]:
    """Header fields of a concept; what is not known is left out."""
    architecture, short = FAMILIES[concept.meta.get("family", "sd1")]
    ranks = sorted({down.shape[0] for down, _ in concept.pairs().values()})
    meta = concept.meta
    fields = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora" if ranks else architecture,
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": meta.get("title") or f"{concept.key} ({concept.method})",
        "modelspec.resolution": meta.get("resolution", ""),
        "modelspec.date": meta.get("date", ""),
        "modelspec.trigger_phrase": " ".join(filter(None, (concept.token, concept.class_word))),
        "modelspec.prediction_type": {"v_prediction": "v"}.get(meta.get("prediction", ""), meta.get("prediction", "")),
        "ss_base_model_version": short,
        "ss_network_module": "networks.lora" if ranks else "",
        "ss_network_dim": str(ranks[0]) if len(ranks) == 1 else "Dynamic" if ranks else "",
        "ss_network_alpha": str(ranks[0]) if len(ranks) == 1 else "Dynamic" if ranks else "",
        "ss_learning_rate": meta.get("learning_rate", ""),
        "ss_steps": meta.get("steps", ""),
        "ss_seed": meta.get("seed", ""),
    }
    return {name: value for name, value in fields.items() if value}
