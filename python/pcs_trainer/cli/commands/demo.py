"""pcs demo: the example subject by all four methods, and a report."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import UsageError
from ..exit_codes import DONE, FAILED, INTERRUPTED
from ..interrupt import stop_on_ctrl_c
from ..options import Command, Option, number

OPTIONS = (
    Option("--photos", "other photos to learn from; none is the example mug", metavar="FOLDER", group="demo"),
    Option("--class", "what they show", metavar="WORD", default="mug", group="demo", dest="class_word"),
    Option(
        "--effort", "share of the training steps, for a quick look", number(0.001, 1, "0.1"), 1.0, "X", group="demo"
    ),
    Option("--out", "folder for the report and its parts", metavar="FOLDER", default="out/demo", group="output"),
    Option("--quiet", "print the report's path alone", None, False, group="output"),
)

EXAMPLES = (
    ("pcs demo", "everything, in a few minutes on two CPU cores, into out/demo"),
    ("pcs demo --effort 0.05 --out out/quick-demo", "the same in little time, to see that it runs; it learns little"),
)


def run(options: argparse.Namespace) -> int:
    if options.photos and not Path(options.photos).exists():
        raise UsageError(f"--photos: {options.photos} does not exist; give a folder of photos")
    if Path(options.out).is_file():
        raise UsageError(f"--out: {options.out} is a file; name a folder")
    from ..demo import run_demo

    with stop_on_ctrl_c("stopping after this step") as stop:
        result = run_demo(
            Path(options.out),
            options.photos,
            options.class_word,
            options.effort,
            should_stop=stop,
            quiet=options.quiet,
        )
    if stop():
        return INTERRUPTED
    print(result.report)
    return FAILED if result.failures else DONE


COMMAND = Command(
    name="demo",
    about="learn the example subject by all four methods and write a report",
    options=OPTIONS,
    examples=EXAMPLES,
    run=run,
    details="DreamBooth, Custom Diffusion, Personalized Residuals (drawn with and without LAG) and TextBoost learn "
    "four photos of one mug on the embedded model. It leaves a contact sheet, loss curves, attention maps, numbers and "
    "one self-contained report.html.",
)
