"""The header fields that other tools read: modelspec.* and ss_*."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

OTHER_TOOLS = ("modelspec.", "ss_")  # what these fields begin with
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
FAMILIES = {  # family -> (architecture, the name that kohya's tools use)
    "sd1": ("stable-diffusion-v1", "sd_v1.x"),
    "sd2": ("stable-diffusion-v2-768-v", "sd_v2.x"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}
Kind = Literal["lora", "textual-inversion", "checkpoint"]  # modelspec's words; a file of differences is a "lora"
PREDICTIONS = {"v_prediction": "v"}  # diffusers' name -> modelspec's, where they differ


def header(
    subject: str, title: str, ranks: Sequence[int], meta: Mapping[str, str], kind: Kind = "lora"
) -> dict[str, str]:
    """The header fields of a file; a field without a value is left out.

    Args:
        subject: the words that name the subject in a prompt.
        title: what to call the file where `meta` has no title.
        ranks: the different ranks of its low-rank residuals, ascending; none of a file without any.
        kind: what the file is; of a whole model the architecture alone is written.
        meta: family, resolution, date, prediction, learning_rate, steps and seed, as far as they are known.
    """
    architecture, short = FAMILIES[meta.get("family", "sd1")]
    prediction = meta.get("prediction", "")
    rank = "" if not ranks else str(ranks[0]) if len(ranks) == 1 else "Dynamic"
    fields = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture if kind == "checkpoint" else f"{architecture}/{kind}",
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": meta.get("title") or title,
        "modelspec.resolution": meta.get("resolution", ""),
        "modelspec.date": meta.get("date", ""),
        "modelspec.trigger_phrase": subject,
        "modelspec.prediction_type": PREDICTIONS.get(prediction, prediction),
        "ss_base_model_version": short,
        "ss_v2": "True" if short.startswith("sd_v2") else "",  # by which A1111 tells SD2.x's files from SD1.x's
        "ss_network_module": "networks.lora" if ranks else "",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_learning_rate": meta.get("learning_rate", ""),
        "ss_steps": meta.get("steps", ""),
        "ss_seed": meta.get("seed", ""),
    }
    return {name: value for name, value in fields.items() if value}
