"""What an export wrote and what it left out; writing one of its files."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ...files import write_safetensors
from ..checking import LONGEST_WORD

NAMED = 3  # tensors that a sentence quotes before it says "and N more"


@dataclass
class Report:
    """What an export wrote, and what it left out with the reason; every tensor of the concept is in one of the two."""

    format: str
    files: list[Path] = field(default_factory=list)
    written: dict[str, str] = field(default_factory=dict)  # the concept's name -> file: key
    skipped: dict[str, str] = field(default_factory=dict)  # the concept's name -> why not
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        size = sum(file.stat().st_size for file in self.files if file.is_file()) / 1e6
        total = len(self.written) + len(self.skipped)
        lines = [f"{self.format}: {len(self.written)} of {total} tensors in {len(self.files)} files, {size:.2f} MB"]
        reasons: dict[str, list[str]] = defaultdict(list)
        for name, reason in self.skipped.items():
            reasons[reason].append(name)
        lines += [f"left out {listed(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines + self.notes)


def listed(names: list[str]) -> str:
    """The first few names in a sentence, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def file_part(word: str) -> str:
    """A word as part of a file's name; as long as one may be."""
    return re.sub(r"[^\w.-]+", "", word).encode()[:LONGEST_WORD].decode(errors="ignore") or "word"


def file_header(tensors: Mapping[str, Tensor], fields: Mapping[str, str] | None) -> dict[str, str]:
    """The header of an exported file: the given fields and modelspec's hash of its tensors' bytes.

    fields: None leaves out everything but what safetensors' readers need.
    """
    if fields is None:
        return {"format": "pt"}
    from safetensors.torch import save

    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    body = data[8 + int.from_bytes(data[:8], "little") :]  # what follows the header and its length in eight bytes
    return {"format": "pt", **fields, "modelspec.hash_sha256": "0x" + hashlib.sha256(body).hexdigest()}


def write_file(
    file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], names: Mapping[str, str], report: Report
) -> None:
    """Write one file of an export and record it.

    Args:
        file: refused where the export wrote it already.
        tensors: by the other tool's keys.
        header: of the file.
        names: the concept's name of each tensor -> the other tool's key.
        report: where it is recorded.
    """
    if file in report.files:
        raise ValueError(
            f"two of the concept's words make one file name, {file.name}: give one another with .renamed(...)"
        )
    write_safetensors(file, tensors, header)
    report.files.append(file)
    report.written |= {own: f"{file.name}: {key}" for own, key in names.items()}
