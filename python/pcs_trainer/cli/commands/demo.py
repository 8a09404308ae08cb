"""pcs demo: the example subject by several methods, and a report."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import UsageError
from ..demo import DEFAULT_METHODS
from ..exit_codes import DONE, FAILED, INTERRUPTED
from ..interrupt import stop_on_ctrl_c
from ..options import Command, Option, grouped, number, one_of
from . import COMMANDS
from .common import METHODS

OPTIONS = (
    *grouped(
        "demo",
        Option("--photos", "photos to learn from", metavar="FOLDER", otherwise="the example mug"),
        Option("--class", "what they show", metavar="WORD", default="mug", dest="class_word"),
        Option(
            "--methods",
            f"a method to show: {', '.join(METHODS)}; may be repeated",
            one_of("method", METHODS),
            metavar="NAME",
            many=True,
            also=("--method",),
            otherwise=", ".join(DEFAULT_METHODS),
        ),
        Option("--effort", "share of the training steps, for a quick look", number(0.001, 1, "0.1"), 1.0, "X"),
    ),
    *grouped(
        "output",
        Option("--out", "folder for the report and its parts", metavar="FOLDER", default="out/demo"),
        Option("--quiet", "print only the report's path", None, False),
    ),
)

EXAMPLES = (
    ("pcs demo", "four methods, in a few minutes on two CPU cores, into out/demo"),
    ("pcs demo --effort 0.05 --out out/quick-demo", "the same in little time, to see that it runs; it learns little"),
    ("pcs demo --methods textboost --methods textual_inversion --out out/words", "the methods that learn a word"),
)


def run(options: argparse.Namespace) -> int:
    """Run the demo and print its report's path; the exit code."""
    if options.photos and not Path(options.photos).exists():
        raise UsageError(f"--photos: {options.photos} does not exist; give a folder of photos")
    if Path(options.out).is_file():
        raise UsageError(f"--out: {options.out} is a file; name a folder")
    from ..demo.running import run_demo

    with stop_on_ctrl_c("stopping after this step") as stop:
        result = run_demo(
            Path(options.out),
            options.photos,
            options.class_word,
            options.effort,
            list(dict.fromkeys(options.methods or DEFAULT_METHODS)),
            should_stop=stop,
            quiet=options.quiet,
        )
    if stop():
        return INTERRUPTED
    print(result.report)
    return FAILED if result.failures else DONE


COMMAND = Command(
    name="demo",
    about=COMMANDS["demo"],
    options=OPTIONS,
    examples=EXAMPLES,
    run=run,
    details="The methods learn four photos of one mug on the embedded model; Personalized Residuals is sampled with "
    "and without LAG. The demo leaves a contact sheet, loss curves, attention maps, scores and one "
    "self-contained report.html.",
)
