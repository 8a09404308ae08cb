"""pcs export: a concept as files that other programs load."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import UsageError
from ..config import keep_config
from ..exit_codes import DONE
from ..options import Command, Option, grouped, number, one_of
from . import COMMANDS
from .common import CONCEPT_FILE, MODEL_FLAGS, concept_file, open_concept, open_model, say
from .other_trainers import MODEL_TRANSLATE

FORMATS = ("diffusers", "kohya", "pipeline", "concept")

OPTIONS = (
    Option(
        "concept",
        "a run's folder, a concept file, or another program's LoRA or embedding",
        metavar="CONCEPT",
        group="words",
    ),
    *grouped(
        "export",
        Option(
            "--format",
            "diffusers, kohya (ComfyUI, A1111), pipeline (a whole model) or concept (this package's)",
            one_of("format", FORMATS),
            "diffusers",
            "NAME",
            also=("--save_model_as",),
        ),
        Option("--no-metadata", "write no training metadata into the header", None, False, also=("--no_metadata",)),
        Option(
            "--word-files",
            "learned words of a pipeline as embedding files, beside the base model's own token table",
            None,
            False,
            also=("--word_files",),
        ),
        Option(
            "--same-rank",
            "pad the ranks of kohya's file to the largest, for diffusers 0.32",
            None,
            False,
            also=("--same_rank",),
        ),
        Option(
            "--compress",
            "compress to this share of the singular values before exporting",
            number(0, 1, "0.6"),
            metavar="X",
            otherwise="off",
        ),
    ),
    *MODEL_FLAGS,
    Option(
        "--out",
        "folder for the files",
        metavar="FOLDER",
        also=("--output_dir",),
        group="output",
        otherwise="out/export/FORMAT",
    ),
)

EXAMPLES = (
    ("pcs export out/mug", "for diffusers' load_lora_weights"),
    ("pcs export out/mug --format kohya --out out/for-comfyui", "for ComfyUI and A1111"),
    ("pcs export out/mug --format pipeline --out out/mug-pipeline", "a whole diffusers pipeline"),
    (
        "pcs export out/for-comfyui/mug.safetensors --format concept --out out/imported",
        "another program's LoRA as a concept",
    ),
)


def run(options: argparse.Namespace) -> int:
    """Export the concept and print its files; the exit code."""
    if len(options.concept or []) != 1:
        raise UsageError("pcs export needs one concept: pcs export out/mug --format kohya")
    where = options.concept[0]
    concept_file(where)
    folder = Path(options.out or Path("out/export") / options.format)
    if folder.is_file():
        raise UsageError(f"--out: {folder} is a file; name a folder")
    from ...concept.compression import compress
    from ...concept.formats.writing import export

    model = open_model(options)
    concept = open_concept(where, model)
    if options.compress:
        concept = compress(concept, model, options.compress)
    if options.format == "concept":
        files = [concept.save(folder / CONCEPT_FILE)]
    else:
        report = export(
            concept,
            folder,
            options.format,
            model=model,
            metadata=not options.no_metadata,
            word_files=options.word_files,
            same_rank=options.same_rank,
        )
        say(str(report))
        files = report.files
    keep_config(folder / "run.toml", COMMAND, options)
    for file in files:
        print(file)
    return DONE


COMMAND = Command(
    name="export",
    about=COMMANDS["export"],
    options=OPTIONS,
    examples=EXAMPLES,
    run=run,
    details="Every export reports the tensors it wrote, and names each that the format cannot hold.",
    translate=MODEL_TRANSLATE,
)
