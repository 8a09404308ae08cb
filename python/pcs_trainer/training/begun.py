"""Settings of a run that goes on: what nobody asked for is as the run began, whatever defaults have become since."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ..settings import Settings, with_none_for_unset
from .checkpoint import FREE

NEEDED = ("offload", "resident", "states")  # free to change, but a run that needed them needs them again
OWN = ("method", "class_word", "token", "seed", "init_word")  # of each subject for itself, or of the call


def as_it_began(s: Settings, asked: Collection[str], was: Mapping[str, Any], number: int) -> Settings:
    """A subject's settings for going on with a run.

    Args:
        s: what a new run would have.
        asked: the settings that the caller gave.
        was: the run's checkpoint, as `begun_with` reads it; {} changes nothing.
        number: which of the run's subjects.
    """
    before = was.get("settings")
    if not isinstance(before, dict) or before.get("method", s.method) != s.method:
        return s
    known = s.asdict()
    values = with_none_for_unset(type(s), {n: v for n, v in before.items() if n in known})
    kept = {
        n: _as_tuple(v) for n, v in values.items() if n not in asked and (n not in FREE or n in NEEDED) and n not in OWN
    }
    subjects = before.get("subjects") or []
    if "token" not in asked and number < len(subjects):
        kept["token"] = subjects[number][1]
    if "init_word" not in asked:
        starts = was.get("starts") or []
        kept["init_word"] = starts[number] if number < len(starts) else before.get("init_word") or None
    return replace(s, **kept)


def _as_tuple(value: Any) -> Any:
    """A list, which is how JSON keeps a tuple, as a tuple."""
    return tuple(value) if isinstance(value, list) else value
