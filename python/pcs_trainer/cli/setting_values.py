"""Settings on the command line: text to a value by the type hints of a method's settings."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from ..errors import UsageError
from ..settings import alternatives, kind_text
from .options import meant

TRUTH = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False, "on": True, "off": False}


def as_kind(name: str, text: str, kind: Any) -> Any:
    """A setting's value from its text.

    Args:
        name: the setting, for the message.
        text: what was written; "none" is None where the type takes it, parts of a tuple stand between semicolons.
        kind: the setting's type: bool, int, float, str, a Literal, a tuple of these, or a union.

    Raises:
        UsageError: one sentence that names what was expected.
    """
    kinds = alternatives(kind)
    if type(None) in kinds and text.lower() == "none":
        return None
    for one in sorted(kinds, key=lambda one: one is str):  # any text is a str, so it is tried last
        try:
            return _value(one, text)
        except ValueError:
            continue
    expected = " or ".join(filter(None, map(_in_words, kinds)))
    hint = meant(text, [str(choice) for one in kinds if get_origin(one) is Literal for choice in get_args(one)])
    raise UsageError(f"--set: {name}: expected {expected}, got {text!r}{hint}")


def _value(kind: Any, text: str) -> Any:
    """The text as a value of one type that is not a union; ValueError where it is not one."""
    if kind is bool:
        if text.lower() not in TRUTH:
            raise ValueError(text)
        return TRUTH[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    if get_origin(kind) is Literal:
        plain = text.lower().replace("-", "_")
        for choice in get_args(kind):
            if plain == str(choice).lower().replace("-", "_"):
                return choice
    if get_origin(kind) is tuple:
        return tuple(_value(get_args(kind)[0], part.strip()) for part in text.split(";") if part.strip())
    raise ValueError(text)


def _in_words(kind: Any) -> str:
    """What a type takes as text, as a message says it; "" for what has no text."""
    if get_origin(kind) is tuple:
        return f"{kind_text(get_args(kind)[0])}, several of them with ';' between"
    return "" if get_origin(kind) is dict else kind_text(kind)
