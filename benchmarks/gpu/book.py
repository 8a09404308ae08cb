"""The results file: every section's rows, written whole each time that a row begins or ends."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "gpu.json"
WAITING, RUNNING, DONE, FAILED, ABSENT = "not run", "running", "ok", "failed", "absent"
AGAIN = 75  # exit code of a section: the rest of its rows needs a new process
LISTING = "(the section itself)"  # the row of what befell a section before it had rows


def sentence(error: BaseException) -> str:
    """An error as one line: the kind where it is no ValueError or RuntimeError, and the first 400 characters."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    kind = type(error).__name__
    plain = kind in ("ValueError", "RuntimeError", "OSError") and text
    return (text if plain else f"{kind}: {text}" if text else kind)[:400]


class Book:
    """The rows of every section in one folder.

    One process writes at a time: the section's own while it runs, and the one that started it before and after.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.read()

    def read(self) -> None:
        """What is there; a file of another form is an error, as writing over it would lose it."""
        self.sections: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            self.sections = json.loads(self.path.read_text(encoding="utf-8"))["sections"]

    def write(self) -> None:
        """The whole file, or none of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"sections": self.sections}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)

    def begin_section(self, name: str) -> None:
        """Forget what an earlier run wrote of a section."""
        self.sections[name] = {"machine": {}, "rows": []}
        self.write()

    def plan_rows(self, section: str, machine: Mapping[str, str], names: Sequence[str]) -> None:
        """All rows that are to come: what is never reached then stays "not run"."""
        if len(set(names)) != len(names):
            raise ValueError(f"two rows of {section} have one name: {sorted(names)}")
        rows = [{"row": name, "status": WAITING} for name in names]
        self.sections[section] = {"machine": dict(machine), "rows": rows}
        self.write()

    def rows(self, section: str) -> list[dict[str, Any]]:
        """The section's rows, in their order."""
        found: list[dict[str, Any]] = self.sections.get(section, {}).get("rows", [])
        return found

    def status(self, section: str, name: str) -> str:
        """One row's."""
        return next(str(row["status"]) for row in self.rows(section) if row["row"] == name)

    def put(self, section: str, name: str, found: Mapping[str, Any]) -> None:
        """Replace a row, or add it, and save."""
        row = {"row": name, **found}
        rows = self.rows(section)
        places = [i for i, old in enumerate(rows) if old["row"] == name]
        if places:
            rows[places[0]] = row
        else:
            self.sections.setdefault(section, {"machine": {}, "rows": []})["rows"] = [*rows, row]
        self.write()

    def close_running(self, section: str, said: str) -> bool:
        """Fail the row that a process died in; whether there was one."""
        names = [row["row"] for row in self.rows(section) if row["status"] == RUNNING]
        for name in names:
            self.put(section, name, {"status": FAILED, "said": said})
        return bool(names)


def unwell(rows: Sequence[Mapping[str, Any]]) -> int:
    """Rows that failed or were never reached."""
    return sum(row["status"] not in (DONE, ABSENT) for row in rows)


def summary(book: Book, sections: Sequence[str]) -> str:
    """A line for each section, and one for each row that has no figures, with the reason."""
    lines = []
    for name in sections:
        rows = book.rows(name)
        counts = {status: sum(row["status"] == status for row in rows) for status in (DONE, FAILED, ABSENT, WAITING)}
        counted = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        lines.append(f"{name}: {counted or 'not begun'}")
        lines += [
            f"  {row['row']}: {row['status']}: {str(row.get('said', ''))[:200]}"
            for row in rows
            if row["status"] in (FAILED, ABSENT)
        ]
    total = unwell([row for name in sections for row in book.rows(name)])
    return "\n".join([*lines, f"{total} rows failed or were not reached"])
