"""pcs retrieve: class images for training out of a user's own pictures, by their similarity to the class prompt."""

from __future__ import annotations

import argparse
import shlex

from ...errors import UsageError
from ..config import keep_config
from ..exit_codes import DONE, INTERRUPTED
from ..interrupt import Stopped, stop_on_ctrl_c
from ..options import Command, Option, grouped, integer
from ..progress import Progress, quiet_libraries
from . import COMMANDS
from .common import say

SHOWN = 5  # unusable pictures that are named one by one

OPTIONS = (
    Option(
        "pictures",
        "folders of pictures, with the folders in them, or single pictures",
        metavar="PICTURES",
        many=True,
        group="words",
    ),
    *grouped(
        "retrieval",
        Option(
            "--prompt",
            "the class prompt that the pictures are compared with, such as 'photo of a cat'",
            metavar="TEXT",
            also=("--class-prompt", "--target-name"),
        ),
        Option("--count", "pictures to find", integer(1, "200"), 200, "N", also=("--num_class_images",)),
        Option("--clip", "folder of a CLIP model that transformers reads", metavar="FOLDER"),
        Option("--judge", "compare by the embedded model's judge, for pictures of its world", None, False),
    ),
    *grouped(
        "output",
        Option(
            "--out",
            "new folder for images.txt and caption.txt",
            metavar="FOLDER",
            default="out/class-images",
            also=("--outpath",),
        ),
        Option("--copy", "copy the pictures there, in place of paths to where they are", None, False),
        Option("--quiet", "print only the folder", None, False),
    ),
)

EXAMPLES = (
    (
        'pcs retrieve examples/photos --prompt "a photo of a mug" --judge --count 2 --out out/mugs',
        "the two that the embedded model's judge finds nearest, as a list",
    ),
    (
        'pcs retrieve my-photos --prompt "photo of a dog" --clip path/to/clip --count 2 --copy --out out/dogs',
        "by CLIP, the pictures copied",
    ),
    (
        "pcs train my-photos --class dog --method custom_diffusion --prior-folder out/dogs --out out/with-dogs",
        "trains with them as class images",
    ),
)


def check(options: argparse.Namespace) -> None:
    """UsageError for what is wrong already, before anything is loaded."""
    if not options.pictures:
        raise UsageError("pcs retrieve needs a folder of pictures: pcs retrieve my-pictures --prompt 'photo of a cat'")
    from ...data.class_request import check_request

    try:
        check_request(options.pictures, options.prompt or "", options.out, options.clip, options.judge)
    except ValueError as error:
        raise UsageError(str(error)) from None


def run(options: argparse.Namespace) -> int:
    """Find the pictures and print the folder that lists them; the exit code."""
    check(options)
    from ...evaluation.retrieval import retrieve

    quiet_libraries()
    with stop_on_ctrl_c("stopping; nothing is written") as stop, Progress("comparing", quiet=options.quiet) as progress:

        def count(done: int, total: int) -> None:
            if stop():
                raise Stopped
            progress.count(done, total)

        try:
            found = retrieve(
                options.pictures,
                options.prompt,
                options.out,
                count=options.count,
                clip=options.clip,
                judge=options.judge,
                copy=options.copy,
                progress=count,
            )
        except Stopped:
            return INTERRUPTED
    for reason in found.skipped[:SHOWN]:
        say(f"left out: {reason}")
    if len(found.skipped) > SHOWN:
        say(f"left out: {len(found.skipped) - SHOWN} more")
    if len(found.pictures) < options.count:
        say(f"{len(found.pictures)} pictures, not the {options.count} asked for: the others cannot be used")
    if not options.quiet:
        say(f"{found}; pcs train ... --prior-folder {shlex.quote(options.out)} takes them as class images")
    keep_config(found.folder / "run.toml", COMMAND, options)
    print(options.out)
    return DONE


COMMAND = Command(
    name="retrieve",
    about=COMMANDS["retrieve"],
    options=OPTIONS,
    examples=EXAMPLES,
    run=run,
    details="Custom Diffusion's class images are real pictures of the class. The folder lists them as its own "
    "retrieval does: images.txt has a path a line, caption.txt the caption of each, which is the text file beside the "
    "picture or else the prompt.",
)
