"""pcs doctor: what this machine has, what is used of it, and one thing to do about the rest."""

from __future__ import annotations

import argparse

from ..exit_codes import DONE, FAILED
from ..options import Command
from . import COMMANDS


def run(_: argparse.Namespace) -> int:
    """Examine the machine and print what was found; the exit code."""
    from ..doctor import examine, report

    found = examine()
    print(report(found))
    return FAILED if any(op.wrong for op in found.ops) else DONE


COMMAND = Command(
    name="doctor",
    about=COMMANDS["doctor"],
    options=(),
    examples=(("pcs doctor", "device, precision, backend and error of each op, versions, and one thing to do"),),
    run=run,
)
