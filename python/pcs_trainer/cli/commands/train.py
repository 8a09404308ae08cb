"""pcs train: learn a subject from a few photos."""

from __future__ import annotations

import argparse
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ..config import write_config
from ..exit_codes import DONE, INTERRUPTED
from ..interrupt import stop_on_ctrl_c
from ..options import Command, Option, byte_size, meant, number, one_of, whole
from ..progress import Progress
from .common import CONCEPT_FILE, HUB_EXAMPLE, METHODS, MODEL_FLAGS, TRANSLATE, open_model, say
from .other_trainers import class_prompt, concepts_list, instance_prompt, needless_flags, photos, report_to, resume_from

if TYPE_CHECKING:
    from ...model.model import Model
    from ...training.stop import Stop

PLANS = ("eager", "A", "B", "C", "checkpoint")

# Flags that are about one call alone: no part of the configuration that is written beside a result.
ONCE = ("resume", "overwrite", "quiet", "no_report")

# Flags that are settings of the same meaning: flag's key -> setting's name.
SETTINGS = {
    "class": "class_word", "token": "token", "prompt": "template", "class_prompt": "class_template", "steps": "steps",
    "batch": "batch", "accumulate": "accumulate", "lr": "learning_rate", "token_lr": "token_learning_rate",
    "lr_schedule": "lr_schedule", "warmup": "warmup", "rank": "rank", "prior_weight": "prior_weight",
    "prior_images": "prior_images", "prior_folder": "prior_folder", "snr_gamma": "snr_gamma", "seed": "seed",
    "train_text_encoder": "train_text_encoder", "resolution": "resolution", "plan": "plan", "optimizer": "optimizer",
    "checkpoint_every": "checkpoint_every", "keep": "keep", "preview_every": "preview_every",
    "probe_every": "probe_every",
    "preview": "preview_prompts", "clip_norm": "clip_norm", "weight_decay": "weight_decay", "identifier": "identifier",
}  # fmt: skip


def further(text: str) -> str:
    """A further subject's FOLDER=WORD[:TOKEN]."""
    folder, _, words = text.rpartition("=")
    if not folder or not words.split(":")[0].strip():
        raise argparse.ArgumentTypeError(f"{text!r} does not read FOLDER=WORD, such as my-cat=cat or my-cat=cat:<tom>")
    if not Path(folder).expanduser().exists():
        raise argparse.ArgumentTypeError(f"{folder} does not exist; give a folder of photos")
    return text


OPTIONS = (
    Option("photos", "a folder of photos, or the photos", metavar="PHOTOS", many=True, group="words"),
    Option("--class", "what the subject is, in a word or two: mug, dog, old house", metavar="WORD",
           also=("--class_word", "--initializer_token"), group="what to learn"),
    Option("--method", ", ".join(METHODS), one_of("method", METHODS), METHODS[0], "NAME", group="what to learn"),
    Option("--token", "the word that will name the subject; none lets the method choose", metavar="WORD",
           also=("--modifier_token", "--placeholder_token"), group="what to learn"),
    Option("--with", "another subject to learn together with it; the token is optional", further,
           metavar="FOLDER=WORD[:TOKEN]", many=True, group="what to learn"),
    Option("--identifier", "rare, learned or plain: what kind of word that is",
           one_of("identifier", ("rare", "learned", "plain")), metavar="KIND", group="what to learn"),
    Option("--prompt", "what a photo shows, with {subject} for its words: 'a photo of a {subject}'", metavar="TEXT",
           group="what to learn"),
    Option("--class-prompt", "what a picture of the class shows, with {class}: 'a {class}'", metavar="TEXT",
           group="what to learn"),
    *MODEL_FLAGS,
    Option("--steps", "training steps; none is the method's own number", whole(1, "150"), metavar="N",
           also=("--max_train_steps",), group="training"),
    Option("--batch", "pictures a step", whole(1, "4"), metavar="N", also=("--train_batch_size",), group="training"),
    Option("--accumulate", "steps whose gradients add up to one", whole(1, "1"), metavar="N",
           also=("--gradient_accumulation_steps",), group="training"),
    Option("--lr", "learning rate; none is the method's own", number(0, 1, "1e-3"), metavar="X",
           also=("--learning_rate", "--unet_lr"), group="training"),
    Option("--token-lr", "learning rate of the word's own rows", number(0, 1, "1e-3"), metavar="X",
           also=("--text_encoder_lr",), group="training"),
    Option("--lr-schedule", "constant, cosine or linear", one_of("schedule", ("constant", "cosine", "linear")),
           metavar="NAME", also=("--lr_scheduler",), group="training"),
    Option("--warmup", "steps until the learning rate is reached", whole(0, "0"), metavar="N",
           also=("--lr_warmup_steps",), group="training"),
    Option("--rank", "rank of low-rank updates", whole(1, "4"), metavar="N", also=("--network_dim", "--lora_rank"),
           group="training"),
    Option("--prior-weight", "weight of the loss on pictures of the class; 0 is off", number(0, example="1"),
           metavar="X", also=("--prior_loss_weight",), group="training"),
    Option("--prior-images", "how many of them the model draws", whole(1, "100"), metavar="N",
           also=("--num_class_images",), group="training"),
    Option("--prior-folder", "real ones instead, with captions beside them", metavar="FOLDER",
           also=("--class_data_dir", "--reg_data_dir"), group="training"),
    Option("--snr-gamma", "min-SNR weight of the loss; 0 is off", number(0, example="5"), metavar="X",
           also=("--min_snr_gamma",), group="training"),
    Option("--clip-norm", "bound on the norm of all gradients; 0 is off", number(0, example="1"), metavar="X",
           also=("--max_grad_norm",), group="training"),
    Option("--weight-decay", "of the optimizer", number(0, 1, "0.01"), metavar="X", also=("--adam_weight_decay",),
           group="training"),
    Option("--train-text-encoder", "train the text encoder as well (DreamBooth)", None, False,
           also=("--train_text_encoder",), group="training"),
    Option("--seed", "of noise, order and choices", whole(0, "0"), metavar="N", group="training"),
    Option("--set", "any other setting, such as --set augment=false", metavar="NAME=VALUE", many=True,
           group="training"),
    Option("--budget", "memory to stay within, such as 6GB: the fastest plan that fits is taken", byte_size,
           metavar="SIZE", group="memory"),
    Option("--plan", "memory plan: eager, A, B, C or checkpoint", one_of("memory plan", PLANS), metavar="PLAN",
           group="memory"),
    Option("--resolution", "pixels a side; none is the model's own", whole(8, "512"), metavar="N", group="memory"),
    Option("--optimizer", "adamw8bit or adamw", one_of("optimizer", ("adamw8bit", "adamw")), metavar="NAME",
           group="memory"),
    Option("--out", "folder for the concept, checkpoints, log and report (default out/CLASS)", metavar="FOLDER",
           also=("--output_dir",), group="output"),
    Option("--resume", "go on from the last checkpoint in the folder", None, False, group="output"),
    Option("--overwrite", "start anew in a folder that holds a concept", None, False, group="output"),
    Option("--checkpoint-every", "steps between checkpoints; 0 is at the end alone", whole(0, "500"), metavar="N",
           also=("--checkpointing_steps", "--save_every_n_steps", "--save_steps"), group="output"),
    Option("--keep", "how many checkpoints stay", whole(1, "2"), metavar="N", also=("--checkpoints_total_limit",),
           group="output"),
    Option("--preview", "prompt of a preview picture, with {} for the subject", metavar="TEXT", many=True,
           also=("--validation_prompt", "--validation_prompts"), group="output"),
    Option("--preview-every", "steps between previews", whole(1, "50"), metavar="N",
           also=("--validation_steps", "--sample_every_n_steps"), group="output"),
    Option("--probe-every", "steps between looks at the held-out loss and the class's drift (default 50)",
           whole(0, "50"), metavar="N", group="output"),
    Option("--tensorboard", "write the losses for TensorBoard, into FOLDER/logs", None, False, group="output"),
    Option("--no-report", "write no report.html", None, False, group="output"),
    Option("--quiet", "print the result alone", None, False, group="output"),
)  # fmt: skip

EXAMPLES = (
    ("pcs train examples/photos --class mug", "the embedded model, Personalized Residuals, into out/mug"),
    ('pcs train examples/photos --class mug --method textboost --preview "a {} on the beach" --out out/textboost',
     "another method, a preview along the way"),
    ("pcs train --config out/mug/run.toml --out out/mug-again", "the same again, by the configuration beside a result"),
    ("pcs train my-dog --class dog --with my-cat=cat --method custom_diffusion --out out/both",
     "two subjects, learned together"),
    ("pcs train examples/photos --class mug --resume --steps 400", "go on where out/mug was stopped, to 400 steps"),
    (f"pcs train my-photos --class dog --model {HUB_EXAMPLE} --method dreambooth --budget 8GB",
     "a real checkpoint within 8 GB"),
    ('pcs train --instance_data_dir my-photos --instance_prompt "a photo of sks dog" --max_train_steps 400',
     "the flags of diffusers' scripts"),
)  # fmt: skip


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were asked for; what is None is left to the method."""
    from ...settings import Settings

    chosen = {}
    for flag, name in SETTINGS.items():
        value = getattr(options, flag)
        if value is not None and value is not False and value != []:
            chosen[name] = tuple(value) if isinstance(value, list) else value
    if options.preview:
        chosen["preview_prompts"] = tuple(p.replace("{}", "{subject}") for p in options.preview)
    kinds = {f.name: f.type for f in fields(Settings)}
    for pair in options.set or ():
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"--set: {pair!r} has no '='; write NAME=VALUE, such as --set augment=false")
        if name not in kinds or name == "method":
            raise UsageError(f"--set: there is no setting {name!r}{meant(name, kinds) or ''}")
        chosen[name] = as_kind(name, text.strip(), kinds[name])
    return chosen


def as_kind(name: str, text: str, kind: str) -> Any:
    try:
        if kind == "bool":
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind.startswith("tuple"):
            return tuple(part.strip() for part in text.split(";"))
        return {"int": int, "float": float, "str": str}[kind](text)
    except (KeyError, ValueError):
        wanted = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kind]
        raise UsageError(f"--set: {name} must be {wanted}, not {text!r}") from None


def check(options: argparse.Namespace) -> Path:
    """What can be said before anything is loaded; the folder of the run."""
    if not options.photos:
        raise UsageError("pcs train needs photos: pcs train FOLDER --class WORD (pcs train --help shows examples)")
    for name in options.photos:
        if not Path(name).expanduser().exists():
            raise UsageError(f"{name} does not exist; give a folder of photos, or the photos")
    if not options.__dict__["class"]:
        raise UsageError("pcs train needs to know what the photos show: --class mug, or dog, or old house")
    if options.budget and options.plan:
        raise UsageError("--budget chooses the memory plan itself; give --budget or --plan, not both")
    if options.resume and options.overwrite:
        raise UsageError("--resume goes on and --overwrite starts anew; give one of them")
    for flag, value in (("--prior-folder", options.prior_folder), ("--model-config", options.model_config)):
        if value and not Path(value).expanduser().exists():
            raise UsageError(f"{flag}: {value} does not exist")
    if options.prompt and "{subject}" not in options.prompt:
        raise UsageError(f"--prompt must hold {{subject}} where the subject's words go; it is {options.prompt!r}")
    folder = Path(options.out or Path("out") / "-".join(options.__dict__["class"].lower().split())).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out: {folder} is a file; name a folder")
    if (folder / CONCEPT_FILE).exists() and not options.resume and not options.overwrite:
        raise UsageError(
            f"{folder} holds a concept already; --resume goes on, --overwrite starts anew, --out names another"
        )
    if options.resume and not folder.is_dir():
        raise UsageError(f"--resume: {folder} does not exist, so there is nothing to go on from; leave --resume out")
    return folder


def run(options: argparse.Namespace) -> int:
    folder = check(options)
    chosen = overrides(options)
    if options.preview and not options.preview_every:
        chosen["preview_every"] = max(1, (options.steps or 200) // 4)
    with stop_on_ctrl_c("stopping after this step and saving") as stop:
        return learn(options, folder, chosen, stop)


def learn(options: argparse.Namespace, folder: Path, chosen: dict[str, Any], stop: Stop) -> int:
    from ...distributed import join
    from ...machine import slow_note
    from ...training.trainer import Trainer

    first = join()[0] == 0
    options.quiet, options.tensorboard = options.quiet or not first, options.tensorboard and first
    model = open_model(options)
    if options.budget:
        chosen |= within_budget(options, model, chosen)
    images = options.photos[0] if len(options.photos) == 1 else options.photos
    events: list[Any] = []
    started = time.monotonic()
    with Progress(options.method, quiet=options.quiet) as progress, board(options, folder) as also:
        trainer = Trainer(model, options.method, images, out=folder, concepts=together(options, images), **chosen)
        if note := slow_note():
            progress.say(note)

        def on_event(event: Any) -> None:
            if event.kind != "step":
                events.append(event)
            if event.kind == "start":  # nothing of an earlier run is lost to one that could not begin
                if options.overwrite:
                    forget_checkpoints(folder)
                write_config(folder / "run.toml", COMMAND, options, without=ONCE, out=str(folder))
            progress(event)
            also(event)

        concept = trainer.train(on_event, stop, options.resume)
    if not first:
        return DONE
    if stop() or concept.meta.get("finished") == "0":
        say(f"stopped and saved after {concept.meta.get('steps')} steps; go on with: {again(folder)}")
        return INTERRUPTED
    if not options.no_report:
        from ...report.of_a_run import write_run_report

        seconds = time.monotonic() - started
        say(f"report: {write_run_report(folder, model, trainer, concept, events, seconds)}")
    say(f'use it: pcs sample "a photo of {{}}" --concept {shlex.quote(str(folder))}{model_flag(options)}')
    print(folder / CONCEPT_FILE)
    return DONE


def forget_checkpoints(folder: Path) -> None:
    """An earlier run's, so that a later --resume does not go on from them."""
    from ...training.checkpoint import checkpoints

    for old in checkpoints(folder):
        shutil.rmtree(old)


def together(options: argparse.Namespace, images: Any) -> list[dict[str, Any]] | None:
    """The subjects that are learned together, where there are several."""
    if not options.__dict__["with"]:
        return None
    subjects = [{"images": images, "class_word": options.__dict__["class"], "token": options.token}]
    for text in options.__dict__["with"]:
        photos, _, words = text.rpartition("=")
        word, _, token = words.partition(":")
        subjects.append({"images": Path(photos).expanduser(), "class_word": word, "token": token})
    return subjects


@contextmanager
def board(options: argparse.Namespace, folder: Path) -> Iterator[Callable[[Any], None]]:
    """Where else events go: TensorBoard, if it was asked for."""
    if not options.tensorboard:
        yield lambda event: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard: tensorboard is not installed; mend: pip install tensorboard") from None
    writer = SummaryWriter(str(folder / "logs"))

    told = {"step": ("loss", "smoothed", "subject", "prior", "lr"), "probe": ("held_out", "drift")}

    def write(event: Any) -> None:
        for name in told.get(event.kind, ()):
            if event.data.get(name) is not None:
                writer.add_scalar(name, event.data[name], event.step)

    try:
        yield write
    finally:
        writer.close()


def within_budget(options: argparse.Namespace, model: Model, chosen: dict[str, Any]) -> dict[str, Any]:
    """The settings of the fastest plan that fits; DoesNotFit says what is missing."""
    from .plan import chosen_plan

    return chosen_plan(model, options.method, options.budget, chosen)


def model_flag(options: argparse.Namespace) -> str:
    return f" --model {shlex.quote(str(options.model))}" if options.model else ""


def again(folder: Path) -> str:
    from ...distributed import rank_and_world

    world = rank_and_world()[1]
    start = "pcs" if world == 1 else f"torchrun --nproc-per-node {world} -m pcs_trainer"
    return f"{start} train --config {shlex.quote(str(folder / 'run.toml'))} --resume"


COMMAND = Command(
    name="train",
    about="learn a subject from a few photos",
    options=OPTIONS,
    examples=EXAMPLES,
    run=run,
    details="Without --model the embedded model learns, in a minute or two on two CPU cores. Ctrl-C once saves and "
    "says how to go on; twice leaves at once. A caption in a .txt file beside a photo is used.",
    translate=TRANSLATE
    | {
        "--instance-data-dir": photos,
        "--train-data-dir": photos,
        "--instance-prompt": instance_prompt,
        "--class-prompt": class_prompt,
        "--concepts-list": concepts_list,
        "--resume-from-checkpoint": resume_from,
        "--report-to": report_to,
    },
    needless=needless_flags(),
)
