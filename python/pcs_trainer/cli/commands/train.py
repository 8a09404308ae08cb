"""pcs train: learn a subject from a few photos."""

from __future__ import annotations

import argparse
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ...run_folder import checkpoints, remove_folder
from ..config import write_config
from ..exit_codes import DONE, INTERRUPTED
from ..interrupt import stop_on_ctrl_c
from ..options import Command
from ..progress import Progress
from . import COMMANDS
from .common import CONCEPT_FILE, HUB_EXAMPLE, UPSCALER_EXAMPLE, open_model, say
from .other_trainers import NEEDLESS, TRAIN_TRANSLATE
from .train_flags import OPTIONS, overrides

if TYPE_CHECKING:
    from ...model.model import Model
    from ...training.stop import Stop
    from ...training.trainer import Trainer

MANY_STEPS, MANY_PHOTOS = 10_000, 100_000  # a method's own run has at most 1,000 steps, which see 4,000 photos

# Flags that are about one call alone: no part of the configuration that is written beside a result.
ONCE = ("resume", "overwrite", "quiet", "no_report")

EXAMPLES = (
    ("pcs train examples/photos --class mug", "the embedded model, Personalized Residuals, into out/mug"),
    (
        'pcs train examples/photos --class mug --method textboost --preview "a {} on the beach" --out out/textboost',
        "another method, with a preview image along the way",
    ),
    (
        "pcs train --config out/mug/run.toml --out out/mug-again",
        "repeat a run from its configuration",
    ),
    (
        "pcs train my-dog --class dog --with my-cat=cat --method custom_diffusion --out out/both",
        "two subjects, trained together",
    ),
    (
        "pcs train examples/photos --class mug --resume --steps 400",
        "continue a run, up to 400 steps",
    ),
    (
        f"pcs train my-photos --class dog --model {HUB_EXAMPLE} --method dreambooth --budget 8GB",
        "a real checkpoint within 8 GB",
    ),
    (
        f"pcs train my-photos --class dog --model {UPSCALER_EXAMPLE} --method dreambooth --set stage=super_resolution "
        "--out out/details",
        "an up-scaler that knows the subject's fine detail (pcs upscale)",
    ),
    (
        'pcs train --instance_data_dir my-photos --instance_prompt "a photo of sks dog" --max_train_steps 400',
        "the flags of diffusers' scripts",
    ),
)


def check(options: argparse.Namespace) -> Path:
    """The folder of the run; UsageError for what is wrong already, before anything is loaded."""
    if not options.photos:
        raise UsageError("pcs train needs photos: pcs train FOLDER --class WORD (pcs train --help shows examples)")
    for name in options.photos:
        if not Path(name).expanduser().exists():
            raise UsageError(f"{name} does not exist; give a folder of photos, or photos")
    if not options.class_word:
        raise UsageError("pcs train needs to know what the photos show: --class mug, or dog, or old house")
    if options.budget and options.plan:
        raise UsageError("--budget picks the recomputation plan; give --budget or --plan, not both")
    if options.resume and options.overwrite:
        raise UsageError("--resume continues a run and --overwrite replaces it; give one of them")
    folders, count = options.prior_folder or [], 1 + len(options.with_subjects or [])
    if len(folders) not in (0, 1, count):
        raise UsageError(
            f"--prior-folder: {len(folders)} folders and {count} subjects; give one for all, or one for each"
        )
    given = (*(("--prior-folder", folder) for folder in folders), ("--model-config", options.model_config))
    for flag, value in given:
        if value and not Path(value).expanduser().exists():
            raise UsageError(f"{flag}: {value} does not exist")
    if options.prompt and "{subject}" not in options.prompt and "{token}" not in options.prompt:
        raise UsageError(
            f"--prompt must contain {{subject}}, where the subject goes, or {{token}}; got {options.prompt!r}"
        )
    folder = Path(options.out or Path("out") / "-".join(options.class_word.lower().split())).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out: {folder} is a file; name a folder")
    if (folder / CONCEPT_FILE).exists() and not options.resume and not options.overwrite:
        raise UsageError(
            f"{folder} already holds a concept. Fix: --resume to continue, --overwrite to replace it, or another --out"
        )
    if checkpoints(folder) and not options.resume and not options.overwrite:
        raise UsageError(
            f"{folder} holds a run that is not finished. Fix: --resume to go on with it, --overwrite to replace it, or "
            "another --out"
        )
    if options.resume and not folder.is_dir():
        raise UsageError(f"--resume: {folder} does not exist, so there is nothing to resume; leave out --resume")
    return folder


def run(options: argparse.Namespace) -> int:
    """Train, and print the concept's path; the exit code."""
    folder = check(options)
    chosen = overrides(options)
    with stop_on_ctrl_c("stopping after this step and saving", signal.SIGTERM) as stop:  # SIGTERM: a cluster's notice
        return learn(options, folder, chosen, stop)


def learn(options: argparse.Namespace, folder: Path, chosen: dict[str, Any], stop: Stop) -> int:
    """The training itself.

    Args:
        folder: of the run.
        chosen: settings that differ from the method's.

    Returns:
        The exit code.
    """
    from ...distributed import join
    from ...machine import slow_note
    from ...training.trainer import Trainer

    first = join()[0] == 0
    options.quiet, options.tensorboard = options.quiet or not first, options.tensorboard and first
    model = open_model(options)
    if options.budget or options.ram:
        chosen |= within_budget(options, model, chosen, folder)
    images = options.photos[0] if len(options.photos) == 1 else options.photos
    events: list[Any] = []
    started = time.monotonic()
    with Progress(options.method, quiet=options.quiet, warns=first) as progress, board(options, folder) as also:
        trainer = Trainer(model, options.method, images, out=folder, concepts=together(options, images), **chosen)
        for note in (slow_note(model.unet.conv_in.weight.device.type), long_note(trainer)):
            if note:
                progress.say(note)

        begin = Beginning(options, folder)

        def on_event(event: Any) -> None:
            if event.kind != "step":
                events.append(event)
            begin(event)
            progress(event)
            also(event)

        concept = trainer.train(on_event, stop, options.resume)
    if not first:
        return DONE
    if concept.meta.get("finished") == "0":
        say(f"stopped and saved after {concept.meta.get('steps')} steps; continue with: {again(folder)}")
        return INTERRUPTED
    if stop():
        say(f"all {concept.meta.get('steps')} steps are done and saved; the report is left out")
        return INTERRUPTED
    if not options.no_report:
        from pcs_kernels import packing

        from ...report.run_report import write_run_report

        seconds = time.monotonic() - started
        say("drawing images for the report; --no-report leaves it out, and the concept is saved already")
        with packing(trainer.settings.packing), Progress("report", quiet=options.quiet) as shown:
            page = write_run_report(folder, model, trainer, concept, events, seconds, shown.count)
        say(f"report: {page}")
    way = "pcs upscale PICTURE" if model.upscales else 'pcs sample "a photo of {}"'
    say(f"use it: {way} --concept {shlex.quote(str(folder))}{model_flag(options)}")
    print(folder / CONCEPT_FILE)
    return DONE


def long_note(trainer: Trainer) -> str:
    """What the steps of a run amount to, where they are many; "" for ordinary numbers."""
    from ...distributed import rank_and_world

    s, photos = trainer.settings, sum(len(subject.pictures) for subject in trainer.subjects)
    seen = s.steps * s.batch * s.accumulate * rank_and_world()[1]
    if s.steps <= MANY_STEPS and seen <= MANY_PHOTOS:
        return ""
    return (
        f"{s.steps:,} steps see {seen:,} photos: each of the {photos:,} about {max(1, seen // photos):,} times; Ctrl-C "
        "stops after a step and saves"
    )


class Beginning:
    """Takes events: at the first that shows that the run could begin, an earlier run's files give way to this one's."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.done = options, folder, False

    def __call__(self, event: Any) -> None:
        if self.done or event.kind not in ("proof", "step", "checkpoint"):
            return
        self.done = True
        options, file = self.options, self.folder / "run.toml"
        if options.overwrite and event.kind != "checkpoint":  # a run that was stopped before step 1 has written one
            forget_checkpoints(self.folder)
        # A bare --resume takes up what the run began with: its own few flags would not repeat it.
        if not (options.resume and file.is_file() and not options.config):
            write_config(file, COMMAND, options, without=ONCE, out=str(self.folder))


def forget_checkpoints(folder: Path) -> None:
    """Delete an earlier run's checkpoints, so that a later --resume does not continue from them."""
    for old in checkpoints(folder):
        remove_folder(old)


def together(options: argparse.Namespace, images: Any) -> list[dict[str, Any]] | None:
    """The subjects that are trained together, where there are several."""
    if not options.with_subjects:
        return None
    subjects = [{"images": images, "class_word": options.class_word, "token": options.token}]
    for text in options.with_subjects:
        photos, _, words = text.rpartition("=")
        word, _, token = words.partition(":")
        subjects.append({"images": Path(photos).expanduser(), "class_word": word, "token": token})
    if len(options.prior_folder or ()) > 1:
        subjects = [{**own, "prior_folder": f} for own, f in zip(subjects, options.prior_folder, strict=True)]
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
        raise UsageError("--tensorboard: tensorboard is not installed. Fix: pip install tensorboard") from None
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


def within_budget(options: argparse.Namespace, model: Model, chosen: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of the fastest plan that fits; DoesNotFit says what is missing.

    A run that goes on keeps what it learns by, whatever would fit today.
    """
    from ...training.checkpoint import begun_with
    from .plan import chosen_plan

    was = begun_with(folder).get("settings", {}) if options.resume else {}
    was = {"weights": "full"} | was if was else {}  # an older version had no other
    chosen = {name: was[name] for name in ("weights", "batch", "accumulate") if name in was} | chosen
    return chosen_plan(model, options.method, options.budget, options.ram, not options.no_report, chosen)


def model_flag(options: argparse.Namespace) -> str:
    """The --model of a command that goes with this one."""
    return f" --model {shlex.quote(str(options.model))}" if options.model else ""


def again(folder: Path) -> str:
    """The command that continues the run in a folder, on as many processes."""
    from ...distributed import rank_and_world

    world = rank_and_world()[1]
    start = "pcs" if world == 1 else f"torchrun --nproc-per-node {world} -m pcs_trainer"
    return f"{start} train --config {shlex.quote(str(folder / 'run.toml'))} --resume"


COMMAND = Command(
    name="train",
    about=COMMANDS["train"],
    options=OPTIONS,
    examples=EXAMPLES,
    run=run,
    details="Without --model the embedded model is trained, in a minute or two on two CPU cores. Ctrl-C once stops, "
    "saves and prints how to continue; twice leaves at once. A .txt file beside a photo is used as its caption.",
    translate=TRAIN_TRANSLATE,
    needless=NEEDLESS,
)
