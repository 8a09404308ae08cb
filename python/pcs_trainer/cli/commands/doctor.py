"""pcs doctor: what this machine has, what is used, and what to do about the rest."""

from __future__ import annotations

import argparse

from ..exit_codes import DONE, FAILED
from ..options import Command
from . import COMMANDS


def run(options: argparse.Namespace) -> int:
    from ..doctor import examine, report

    found = examine()
    print(report(found))
    return FAILED if any(op.wrong for op in found.ops) else DONE


COMMAND = Command(
    name="doctor",
    about=COMMANDS["doctor"],
    options=(),
    examples=(
        ("pcs doctor", "device, precision, each operation's backend and its error here, versions, one line to do"),
    ),
    run=run,
)
