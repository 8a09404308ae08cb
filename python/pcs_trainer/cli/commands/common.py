"""What several commands share: the model and device flags, opening models and concepts, a slot for the subject."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..options import Option, number, one_of, whole
from ..progress import quiet_libraries

if TYPE_CHECKING:
    from ...concept.concept import Concept
    from ...model.model import Model

METHODS = (
    "personalized_residuals", "dreambooth", "dreambooth_lora", "custom_diffusion", "textboost", "textual_inversion",
)  # fmt: skip
SAMPLERS = ("ddim", "dpmpp_2m", "euler", "euler_ancestral")
DTYPES = ("float32", "bfloat16", "float16")
CONCEPT_FILE = "concept.safetensors"
HUB_EXAMPLE = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5"  # Stable Diffusion 1.5's place on the hub, for the help's examples
)

MODEL = Option(
    "--model", "a diffusers folder, a checkpoint file or a hub name; none is the embedded model", metavar="MODEL",
    also=("--pretrained_model_name_or_path", "--base_model"), group="model",
)  # fmt: skip
MODEL_FLAGS = (
    MODEL,
    Option("--device", "cpu, cuda or cuda:1; none is the GPU where there is one", metavar="DEVICE", group="model"),
    Option("--dtype", "float32, bfloat16 or float16; none is what suits the device", one_of("dtype", DTYPES),
           metavar="TYPE", group="model"),
    Option("--model-config", "for a checkpoint file: the folder with its diffusers configuration", metavar="FOLDER",
           group="model"),
)  # fmt: skip
SAMPLING_FLAGS = (
    Option("--steps", "denoising steps", whole(1, "25"), 25, "N", also=("--num_inference_steps", "--ddim_steps"),
           group="pictures"),
    Option("--guidance", "strength of the prompt; none is the model's own", number(0, example="7.5"), metavar="X",
           also=("--guidance_scale", "--cfg_scale"), group="pictures"),
    Option("--sampler", "ddim, dpmpp_2m, euler or euler_ancestral", one_of("sampler", SAMPLERS), "ddim", "NAME",
           also=("--sample_sampler", "--scheduler"), group="pictures"),
    Option("--seed", "of the noise", whole(0, "0"), 0, "N", group="pictures"),
)  # fmt: skip


def precision(text: str) -> list[str]:
    """--mixed_precision's words as a dtype."""
    names = {"no": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    if text not in names:
        raise UsageError(f"--mixed_precision: {text!r} is none of no, fp16, bf16")
    return ["--dtype", names[text]]


TRANSLATE = {"--mixed-precision": precision}


def say(text: str) -> None:
    print(f"pcs: {text}", file=sys.stderr, flush=True)


def open_model(options: argparse.Namespace) -> Model:
    """The model that the flags name, on the device and in the precision that suit, with a line about each choice."""
    import torch

    from ...distributed import local_rank
    from ...errors import UnsupportedModel
    from ...model.model import load_model

    quiet_libraries()
    where = options.model
    if where is None:
        where = "tiny"
        if not getattr(options, "quiet", False):
            say("no --model given: the embedded model is used (64x64 pictures of a small made-up world)")
    device = options.device or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(f"--device: {device!r} is no device; give cpu, cuda or cuda:1") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch sees no GPU here (pcs doctor says why); mend: --device cpu")
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: only cpu and cuda are supported")
    if options.dtype == "float16" and kind == "cpu":
        raise UsageError("--dtype float16: a CPU has no arithmetic in it; mend: --dtype bfloat16 or float32")
    dtype = getattr(torch, options.dtype) if options.dtype else None
    if dtype is None and (kind == "cuda" or where != "tiny"):
        from ...machine import training_dtype

        dtype, reason = training_dtype(kind)
    try:
        model = load_model(where, dtype, device, options.model_config)
    except UnsupportedModel as error:
        raise UsageError(f"--model: {error}") from None
    if dtype is not None and not options.dtype:
        say(f"{str(dtype).removeprefix('torch.')}: {reason}")
    return model


def concept_file(where: str | Path) -> Path:
    """A concept's file, or the one in a run's folder."""
    path = Path(where).expanduser()
    if path.is_dir():
        if not (path / CONCEPT_FILE).is_file():
            raise UsageError(f"{path} has no {CONCEPT_FILE}; give a folder that pcs train wrote, or a concept's file")
        return path / CONCEPT_FILE
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give a folder that pcs train wrote, or a concept's file")
    return path


def open_concept(where: str | Path, model: Model | None, force: bool = False) -> Concept:
    """A concept of ours, or a LoRA, textual inversion or Custom Diffusion file of another program."""
    from ...concept.concept import load_concept

    path = concept_file(where)
    if is_own(path):
        return load_concept(path, model, force)
    from ...concept.formats.reading import import_concept

    if model is None:
        raise UsageError(f"{path} was made by another program; its base model is needed: --model")
    return import_concept(path, model)


def is_own(path: Path) -> bool:
    """Whether a file is a concept of ours, by its header alone."""
    if path.suffix != ".safetensors":
        return False
    from safetensors import SafetensorError, safe_open

    from ...concept.file import FORMAT

    try:
        with safe_open(str(path), "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({' '.join(str(error).split())[:120]})") from None


def subjects_of(concepts: Sequence[Concept]) -> list[str]:
    """The words that name each subject of the concepts."""
    pairs = [pair for c in concepts for pair in json.loads(c.meta.get("subjects") or "[]") or [(c.token, c.class_word)]]
    return [" ".join(filter(None, pair)) for pair in pairs]


def filled(prompt: str, concepts: Sequence[Concept]) -> str:
    """The prompt with {} or {subject} replaced by a subject's words: as many as subjects take them in turn."""
    subjects, place = subjects_of(concepts), re.compile(r"\{(subject)?\}")
    in_turn = iter(subjects if len(place.findall(prompt)) == len(subjects) else [])
    return place.sub(lambda _: next(in_turn, " and ".join(subjects)), prompt)


def free_name(folder: Path, stem: str, suffix: str = ".png") -> Path:
    """stem.png, or stem-2.png ... where it is taken."""
    path, n = folder / f"{stem}{suffix}", 2
    while path.exists():
        path, n = folder / f"{stem}-{n}{suffix}", n + 1
    return path


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-") or "picture"
