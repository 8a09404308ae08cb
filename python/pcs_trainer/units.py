"""Amounts as people write and read them: "6GB" <-> bytes, seconds -> "4 min 09 s"."""

from __future__ import annotations

import re
import time

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(amount: str | float) -> int:
    """Bytes of "6GB", "6 GB", "6000MB", "5.5GiB" or a number of bytes; GB is 10^9.

    Raises ValueError where it is not an amount, or less than a megabyte ("6" was meant as "6GB").
    """
    text = str(amount).strip()
    found = re.fullmatch(r"([-+]?[0-9.]+(?:e[+-]?\d+)?)\s*([kmgt]?i?b?)", text, re.IGNORECASE)
    unit = found[2].upper() if found else "?"
    unit = unit + "B" if unit in ("K", "M", "G", "T", "KI", "MI", "GI", "TI") else unit
    try:
        size = float(found[1]) * UNITS[unit]  # type: ignore[index]
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"{text!r} is not an amount of memory; write 6GB, 6000MB or a number of bytes") from None
    if not size < 10**18:
        raise ValueError(f"{text!r} is not an amount of memory that a machine has; write one such as 6GB")
    if size < 10**6:
        raise ValueError(f"{text!r} is {size:.0f} bytes; write at least a megabyte, such as 6GB")
    return int(size)


def bytes_text(count: float) -> str:
    """512 B, 4.2 MB, 6.13 GB (powers of 1000)."""
    for unit in ("B", "KB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def time_text(seconds: float) -> str:
    """3.2 s, 41 s, 4 min 09 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


class Pace:
    """How long the rest of some work will take, told by how long its first parts took."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def seconds_left(self, done: int, total: int) -> float:
        """Of `total` parts, `done` are done: one at least."""
        return (time.monotonic() - self.started) * (total - done) / done
