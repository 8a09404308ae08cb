"""Which programs read an export: a matter of the format and of the layers in it.

By running them on such files: ComfyUI 0.3.64, InvokeAI 8e71a8a5, stable-diffusion.cpp (python 0.4.7),
sd-scripts 48d368fa, LyCORIS 4.1.3, and diffusers 0.32 and 0.42. docs/command-line.md has the table by method.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..concept import Concept
from ..grammar import TEXT_PARTS, UNET
from .diffusers import needs_pipeline


@dataclass(frozen=True)
class Readers:
    """Programs that take a concept's files in one format, and those that do not, with the reason."""

    take: tuple[str, ...]
    refuse: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        said = [f"read by {', '.join(self.take)}", *(f"not by {name}, which {why}" for name, why in self.refuse)]
        return "; ".join(said)


def readers_of(concept: Concept, format: str, own_rows: bool = False) -> Readers:
    """Who reads a concept that is exported to "diffusers", "kohya" or "pipeline".

    own_rows: the token table of a whole pipeline has rows for the learned words.
    """
    if format == "pipeline" or (format == "diffusers" and needs_pipeline(concept)):
        up_scaler = concept.small_noise is not None
        return Readers(("diffusers",) if own_rows or up_scaler else ("diffusers", "ComfyUI"))
    if not concept.tensors:  # words alone
        return Readers(("diffusers",) if format == "diffusers" else ("ComfyUI", "diffusers"))
    if format == "diffusers":
        return _of_diffusers(concept)
    if concept.changes():
        ignores = ("A1111", "ignores differences: compress makes a LoRA of them")
        return Readers(("ComfyUI", "InvokeAI", "LyCORIS"), (("diffusers", "refuses differences"), ignores))
    readers = ("ComfyUI", "stable-diffusion.cpp", "sd-scripts", "LyCORIS", "diffusers")
    if _unknown_to_invokeai(concept):
        return Readers(readers, (("InvokeAI", "cannot identify a file of these layers alone"),))
    return Readers((*readers, "InvokeAI"))


def _of_diffusers(concept: Concept) -> Readers:
    if concept.changes():
        return Readers(("diffusers",), (("ComfyUI", "does not read Custom Diffusion's file: use kohya's format"),))
    if any(".attn" in slot.layer for slot in concept.residuals()):
        return Readers(("diffusers",), (("ComfyUI", "ignores attention layers by these names: use kohya's format"),))
    return Readers(("diffusers",))


def _unknown_to_invokeai(concept: Concept) -> bool:
    """Found by running it: output projections alone of any family, and SDXL's text encoders alone."""
    slots = concept.residuals().keys()
    outputs_alone = all(slot.part == UNET and slot.layer.endswith("proj_out") for slot in slots)
    text_alone = all(slot.part in TEXT_PARTS for slot in slots)
    return outputs_alone or (text_alone and concept.meta.get("family") == "sdxl")
