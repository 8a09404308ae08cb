"""pcs doctor: what this machine has, what is used, and what to do about the rest."""

from __future__ import annotations

import argparse

from ..cli_options import Command


def run(options: argparse.Namespace) -> int:
    from .. import doctor

    print(doctor.report())
    return 0


COMMAND = Command(
    name="doctor",
    about="what this machine has, what is used, and what to do about the rest",
    options=(),
    examples=(("pcs doctor", "device, precision, each operation's backend and its error here, versions, one line to do"),),
    run=run,
)
