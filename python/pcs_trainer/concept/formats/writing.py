"""Concepts as files that other tools load: diffusers' and kohya's formats, and whole pipeline folders.

"diffusers"  LoRA, Custom Diffusion and embedding files for diffusers; a whole pipeline where weights of other
             kinds were trained (DreamBooth)
"kohya"      one LoRA file and embeddings, for ComfyUI, A1111 and kohya's own tools
"pipeline"   a whole diffusers folder with everything merged into its weights
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...unet.config import family
from ..attach import check_base, check_fits
from ..concept import Concept
from ..grammar import OWN_WORD, TEXT_PARTS, parse
from .diffusers import needs_pipeline, write_diffusers
from .kohya import write_kohya
from .pipeline import write_pipeline
from .readers import readers_of
from .report import Report as Report

if TYPE_CHECKING:
    from ...model.model import Model

FORMATS = ("diffusers", "kohya", "pipeline")
ONLY_HERE = (
    "acts only on tokens from the learned word on; other programs cannot express this, so it is left out (the concept "
    "file keeps it)"
)


def export(
    concept: Concept,
    folder: str | Path,
    format: str = "diffusers",
    model: Model | None = None,
    metadata: bool = True,
    bundle: bool = False,
    word_files: bool = False,
    same_rank: bool = False,
) -> Report:
    """Write a concept as files of other tools, and report every tensor's fate.

    Args:
        concept: what to write.
        folder: where the files go.
        format: "diffusers", "kohya" or "pipeline".
        model: the base model, needed for "pipeline" and wherever whole values become differences.
        metadata: write how it was made into the files' headers.
        bundle: words inside kohya's LoRA file too (A1111 reads them there; diffusers then refuses the file).
        same_rank: pad the pairs of kohya's file to one rank, for readers that lose the scale of mixed ones.
        word_files: words of a whole pipeline as embedding files beside an unchanged token table.

    Returns:
        What was written and what was left out, with the reason; `str` of it is a summary.
    """
    if format not in FORMATS:
        raise ValueError(f"format = {format!r}; the formats are {', '.join(FORMATS)}")
    folder = Path(folder).expanduser()
    if model is not None:
        check_base(concept, model, concept.key)
        check_fits(concept, model, concept.key)
        known = {"family": family(model.unet.settings), "prediction": model.schedule.prediction}
        concept = replace(concept, meta=known | concept.meta)
    report = Report(format)
    _note_limits(concept, report)
    if format == "pipeline" or (format == "diffusers" and needs_pipeline(concept)):
        if model is None:
            raise ValueError(f"{concept.key} goes into a whole pipeline's weights: give the base model (model=...)")
        if format == "diffusers":
            report.notes.append(
                "weights of many kinds were trained, so this is a whole pipeline: load it by its folder"
            )
        write_pipeline(concept, folder, model, metadata, word_files, report)
    elif format == "diffusers":
        write_diffusers(concept, folder, model, metadata, report)
    else:
        write_kohya(concept, folder, model, metadata, bundle, same_rank, report)
    report.notes.append(str(readers_of(concept, format, own_rows=bool(concept.words) and not word_files)))
    return report


def _note_limits(concept: Concept, report: Report) -> None:
    report.skipped |= {name: ONLY_HERE for name in concept.tensors if parse(name).kind in OWN_WORD}
    if concept.hold_first and concept.touches(TEXT_PARTS):
        report.notes.append(
            "the text's first token, and the empty prompt, keep the base model's values here; other programs take them "
            "from the tuned encoder, so their images differ from ours"
        )
