"""The public names of pcs_trainer for editors and type checkers:  python tests/face.py writes __init__.pyi."""

from __future__ import annotations

from pathlib import Path

import pcs_trainer

STUB = Path(__file__).parents[1] / "python" / "pcs_trainer" / "__init__.pyi"


def stub() -> str:
    """What __init__.pyi holds: one import a name, from the dict in __init__.py."""
    names = sorted(pcs_trainer._HOME.items(), key=lambda pair: (pair[1], pair[0]))
    lines = ["# Written by `make face` from the dict in __init__.py.", ""]
    return "\n".join([*lines, *(f"from .{home} import {name} as {name}" for name, home in names), ""])


if __name__ == "__main__":
    STUB.write_text(stub())
