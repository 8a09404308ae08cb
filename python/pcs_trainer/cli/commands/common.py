"""What several commands share: flags of models and sampling, opening models and concepts, prompts with the subject."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...files import free_bytes, read_header
from ...methods import TITLES
from ...sampling.names import LAG_UNCOND
from ...sampling.names import NAMES as SAMPLERS
from ...units import bytes_text
from ..options import Option, byte_size, grouped, integer, number, one_of
from ..progress import quiet_libraries

if TYPE_CHECKING:
    import torch

    from ...concept.concept import Concept
    from ...model.model import Model
    from ...sampling.lag import Lag

METHODS = tuple(TITLES)
DTYPES = ("float32", "bfloat16", "float16")
CONCEPT_FILE = "concept.safetensors"
# For the help's examples: who holds Stable Diffusion 1.5 since its first repository was removed in August 2024.
HUB_EXAMPLE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
UPSCALER_EXAMPLE = "stabilityai/stable-diffusion-x4-upscaler"

METHOD = Option("--method", ", ".join(METHODS), one_of("method", METHODS), METHODS[0], "NAME")
MOST_IMAGES = 10_000  # of one call, hours on a GPU: more is a mistyped number, or several calls with seeds of their own
MANY_IMAGES = 100  # from here on a line says how many there will be
MOST_PIXELS = 16_384  # a side
RESOLUTION = Option(
    "--resolution",
    "image size in pixels",
    integer(8, "512", MOST_PIXELS),
    metavar="N",
    otherwise="the model's native size",
)
SEED = Option("--seed", "random seed", integer(0, "0"), 0, "N")
MODEL = Option(
    "--model",
    "a diffusers folder, a checkpoint file or a hub name",
    metavar="MODEL",
    also=("--pretrained_model_name_or_path", "--base_model"),
    group="model",
    otherwise="the embedded model",
)
MODEL_CONFIG = Option(
    "--model-config", "folder with the diffusers configuration of a checkpoint file", metavar="FOLDER", group="model"
)
RAM = Option("--ram", "limit of the machine's memory, e.g. 16GB", byte_size, metavar="SIZE", otherwise="no limit")
MODEL_FLAGS = (
    MODEL,
    *grouped(
        "model",
        Option("--device", "cpu, cuda, cuda:1, xpu or mps", metavar="DEVICE", otherwise="GPU if available"),
        Option(
            "--dtype", ", ".join(DTYPES), one_of("dtype", DTYPES), metavar="TYPE", otherwise="what suits the device"
        ),
        MODEL_CONFIG,
    ),
)
WEIGHTS = Option(
    "--weights",
    "how the UNet's frozen weights are held: full, or int8, in half the memory of 16 bits",
    one_of("kind of weights", ("full", "int8")),
    metavar="KIND",
    otherwise="full",
    group="model",
)
RESIDENT = Option(
    "--resident",
    "where the UNet's frozen weights are: on the device, or streamed to it from RAM ahead of their use",
    one_of("place", ("device", "streamed")),
    metavar="PLACE",
    otherwise="device",
    group="model",
)
OFFLOAD = Option("--offload", "text encoders, UNet and autoencoder take turns on the GPU", None, False, group="model")
HOLDING = (WEIGHTS, RESIDENT, OFFLOAD)
STATES = Option(
    "--states",
    "where the 8-bit optimizer states are: on the device, or streamed to it from RAM for each update",
    one_of("place", ("device", "streamed")),
    metavar="PLACE",
    otherwise="device",
)
STEPS = Option("--steps", "sampling steps", integer(1, "25"), 25, "N", also=("--num_inference_steps", "--ddim_steps"))
LAG_OPTIONS = (
    Option(
        "--lag-token",
        "a word whose attention makes LAG's mask; of one of several concepts, its token=word; may be repeated",
        metavar="[TOKEN=]WORD",
        many=True,
        also=("--lag-tokens",),
        otherwise="the concepts' tokens and class words",
    ),
    Option(
        "--lag-uncond",
        f"LAG's mask of the half without prompt: {', '.join(LAG_UNCOND)}",
        one_of("mask", LAG_UNCOND),
        LAG_UNCOND[0],
        "NAME",
    ),
    Option("--lag-start", "part of the steps after which LAG masks", number(0, 1, "0.2"), 0.0, "X"),
    Option("--lag-stop", "part of the steps up to which LAG masks", number(0, 1, "0.8"), 1.0, "X"),
    Option("--lag-soft", "LAG's masks between 0 and 1 instead of 0 or 1", None, False),
)
GUIDANCE = Option(
    "--guidance",
    "classifier-free guidance scale",
    number(0, example="7.5"),
    metavar="X",
    also=("--guidance_scale", "--cfg_scale"),
    otherwise="the model's own",
)


STRENGTH = Option(
    "--strength",
    "strength of each concept, in their order",
    number(example="0.8"),
    metavar="X",
    many=True,
    otherwise="1 each",
)
FORCE = Option("--force", "use a concept that was trained on another model", None, False)
NEGATIVE = Option("--negative", "negative prompt", metavar="TEXT", default="", also=("--negative_prompt",))
SAMPLER = Option("--sampler", ", ".join(SAMPLERS), one_of("sampler", SAMPLERS), SAMPLERS[0], "NAME")
ETA = Option("--eta", "eta of ddim: 0 is deterministic, 1 adds noise as DDPM does", number(0, 1, "0"), 0.0, "X")


def check_drawing(options: argparse.Namespace, prompts: Sequence[str]) -> None:
    """UsageError where the flags of a command that draws do not fit together: concepts, prompts, sampler, folder."""
    concepts, strengths = options.concept or [], options.strength or []
    for where in concepts:
        concept_file(where)
    if not concepts and any("{}" in p or "{subject}" in p for p in prompts):
        raise UsageError("{} in a prompt stands for a concept's subject; name one with --concept")
    if strengths and len(strengths) != len(concepts):
        raise UsageError(
            f"{len(strengths)} strengths and {len(concepts)} concepts: give one --strength for each --concept"
        )
    if options.eta and options.sampler != "ddim":
        raise UsageError(f"--eta is only for ddim, not for {options.sampler}")
    if Path(options.out).is_file():
        raise UsageError(f"--out: {options.out} is a file; name a folder")


def lag_of(options: argparse.Namespace) -> bool | Lag:
    """LAG with what the flags say of it, or False; UsageError where they say something of it without --lag."""
    given = {option.name: getattr(options, option.attribute) != option.default for option in LAG_OPTIONS}
    if not options.lag:
        if any(given.values()):
            raise UsageError(f"{next(name for name, own in given.items() if own)} applies to LAG sampling; add --lag")
        return False
    if options.lag_start >= options.lag_stop:
        raise UsageError(f"--lag-start {options.lag_start:g} must be less than --lag-stop {options.lag_stop:g}")
    from ...sampling.lag import Lag

    tokens = lag_tokens(options.lag_token or [])
    return Lag(tokens, uncond=options.lag_uncond, start=options.lag_start, stop=options.lag_stop, soft=options.lag_soft)


def lag_tokens(texts: Sequence[str]) -> list[str] | dict[str, list[str]] | None:
    """The words of LAG's masks: of all concepts, or by the concept's token; None where each goes by its own."""
    pairs = [(token, equals, word.strip()) for token, equals, word in (text.rpartition("=") for text in texts)]
    for text, (token, equals, word) in zip(texts, pairs, strict=True):
        if not word or (equals and not token):
            raise UsageError(f"--lag-token: expected a word, or a concept's token=word, got {text!r}")
    if len({bool(equals) for _, equals, _ in pairs}) > 1:
        raise UsageError("--lag-token: give each word with the token of its concept, TOKEN=WORD, or none")
    if not pairs or not pairs[0][1]:
        return [word for _, _, word in pairs] or None
    found: dict[str, list[str]] = {}
    for token, _, word in pairs:
        found.setdefault(token, []).append(word)
    return found


def check_amount(prompts: int, count: int, steps: int) -> None:
    """Say how many images a call draws where they are many; UsageError where they are absurdly many."""
    total = prompts * count
    if total > MOST_IMAGES:
        each = f"{prompts:,} prompts x --count {count:,}"
        raise UsageError(
            f"{each} are {total:,} images, and one call draws at most {MOST_IMAGES:,}. Fix: a smaller --count, or "
            "several calls, each with another --seed"
        )
    if total > MANY_IMAGES:
        say(f"{total:,} images of {steps} steps each; Ctrl-C ends after the running batch and keeps what is drawn")


def check_room(folder: Path, images: int, size: int) -> None:
    """UsageError where the disk may not hold so many images of size x size pixels; PNG is no larger than the pixels."""
    free, needed = free_bytes(folder), images * (3 * size * size + 4096)
    if free < needed:
        raise UsageError(
            f"--out: the disk of {folder} has {bytes_text(free)} left, and {images} images of {size} x {size} pixels "
            f"may take {bytes_text(needed)}; free some space or give another folder"
        )


def say(text: str) -> None:
    """A remark to the person, on stderr: stdout holds results alone."""
    print(f"pcs: {text}", file=sys.stderr, flush=True)


def open_model(options: argparse.Namespace) -> Model:
    """The model that the flags name, on the device and in the precision that suit, with a line about each choice."""
    from ...errors import UnsupportedModel
    from ...machine import untested
    from ...model.model import load_model

    quiet_libraries()
    where = options.model
    if where is None:
        where = "tiny"
        if not getattr(options, "quiet", False):
            say("no --model given: using the embedded model (64x64 images of a small made-up world)")
    device, kind = device_of(options)
    dtype, reason = dtype_of(options, kind)
    try:
        model = load_model(where, dtype, device, options.model_config)
        model.hold(getattr(options, "weights", None) or "full", getattr(options, "resident", None) or "device")
    except UnsupportedModel as error:
        raise UsageError(f"--model: {error}") from None
    model.offload(bool(getattr(options, "offload", False)))
    if untested(kind):
        say(untested(kind))
    if reason:
        say(f"{str(dtype).removeprefix('torch.')}: {reason}")
    return model


def dtype_of(options: argparse.Namespace, kind: str) -> tuple[torch.dtype, str]:
    """The dtype that `--dtype` names, or the machine's for training on a kind of device, with the reason for that."""
    import torch

    from ...machine import planning_dtype

    if options.dtype:
        return getattr(torch, options.dtype), ""
    if kind == "cpu" and options.model in (None, "tiny"):
        return torch.float32, ""  # so small that a CPU gains nothing from bfloat16
    return planning_dtype(kind)


def device_of(options: argparse.Namespace) -> tuple[str, str]:
    """The device that the flags name and its kind, such as "cuda"; UsageError where it cannot be used."""
    import torch

    from ...distributed import local_rank
    from ...machine import device_problem

    device = options.device or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")
    problem = device_problem(device)
    if problem is not None:
        raise UsageError(f"--device {device}: {problem}")
    kind = torch.device(device).type
    if kind == "meta":
        raise UsageError("--device meta: it has no memory, so nothing can be computed on it")
    if options.dtype == "float16" and kind == "cpu":
        raise UsageError("--dtype float16: not supported on a CPU. Fix: --dtype bfloat16 or float32")
    return device, kind


def concept_file(where: str | Path) -> Path:
    """A concept file, or the one in a run's folder; or the folder itself, where it holds another program's files."""
    path = Path(where).expanduser()
    if path.is_dir() and (path / CONCEPT_FILE).is_file():
        return path / CONCEPT_FILE
    if path.is_dir():
        if (path / "model_index.json").is_file():
            raise UsageError(f"{path} is a whole model and not a concept; give it as --model")
        from ...concept.formats.reading import files_of

        try:
            files_of(path)
        except ValueError:
            raise UsageError(
                f"{path} has no {CONCEPT_FILE}, and no LoRA or embedding of another program; give a folder that pcs "
                "train wrote, or a concept file"
            ) from None
        return path
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give a folder that pcs train wrote, or a concept file")
    return path


def open_concept(where: str | Path, model: Model | None, force: bool = False) -> Concept:
    """A concept of ours, or a LoRA, textual inversion or Custom Diffusion file, or a folder, of another program."""
    from ...concept.loading import load_concept

    path = concept_file(where)
    if is_own(path):
        return load_concept(path, model, force)
    from ...concept.formats.reading import import_concept

    if model is None:
        raise UsageError(f"{path} was made by another program, which needs its base model. Fix: give --model")
    return import_concept(path, model)


def is_own(path: Path) -> bool:
    """Whether a file is a concept of ours, by its header alone."""
    if path.is_dir() or path.suffix != ".safetensors":
        return False
    from ...concept.concept import FORMAT

    return read_header(path).get("format") == FORMAT


def subjects_of(concepts: Sequence[Concept]) -> list[str]:
    """The prompt's words for each subject of the concepts, such as its token and its class."""
    return [name for concept in concepts for name in concept.names]


def filled(prompt: str, concepts: Sequence[Concept]) -> str:
    """The prompt with the subjects in it.

    As many {} or {subject} as there are subjects stand for one each, in turn; any other number of them stands each for
    all subjects, joined by "and".
    """
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
    """A prompt as a file's name, of at most 60 characters: systems allow 255 bytes, people read less."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-") or "picture"
