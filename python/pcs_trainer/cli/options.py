"""What the commands' flags are made of: checked values, other programs' names, near misses, help with examples."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from ..units import parse_bytes


@dataclass(frozen=True)
class Option:
    """One flag (or, without dashes, the command's words), its check and the names it has in other programs."""

    name: str
    help: str
    kind: Callable[[str], Any] | None = str  # None: a flag without a value
    default: Any = None
    metavar: str = ""
    also: tuple[str, ...] = ()
    many: bool = False
    group: str = "options"

    @property
    def key(self) -> str:
        return self.name.lstrip("-").replace("-", "_")

    @property
    def positional(self) -> bool:
        return not self.name.startswith("-")


@dataclass(frozen=True)
class Command:
    """A command's flags, examples and what it runs; `translate` rewrites flags that mean something else elsewhere."""

    name: str
    about: str
    options: tuple[Option, ...]
    examples: tuple[tuple[str, str], ...]
    run: Callable[[argparse.Namespace], int]
    details: str = ""
    translate: dict[str, Callable[[str], list[str]]] = field(default_factory=dict)
    needless: dict[str, str] = field(default_factory=dict)  # accepted, does nothing: why

    @property
    def usage(self) -> str:
        words = [f"{o.metavar} ..." if o.many else o.metavar for o in self.options if o.positional]
        return " ".join(["pcs", self.name, *words, "[flags]"])


COMMON = (
    Option("--config", "flags from a TOML file; the command line wins", metavar="run.toml", group="always"),
    Option("--debug", "show the traceback of an error", None, False, group="always"),
)


# Checks of a flag's text. Each says what is wrong and what would be right.
def whole(least: int = 0, example: str = "") -> Callable[[str], int]:
    def check(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number{_such(example)}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; the least is {least}")
        return value

    return check


def number(least: float | None = None, most: float | None = None, example: str = "") -> Callable[[str], float]:
    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number{_such(example)}") from None
        if value != value or (least is not None and value < least) or (most is not None and value > most):
            bounds = {"at least": least, "at most": most}
            words = " and ".join(f"{name} {bound:g}" for name, bound in bounds.items() if bound is not None)
            raise argparse.ArgumentTypeError(
                f"{text} is out of range{_such(example)}; it must be {words or 'a number'}"
            )
        return value

    return check


def _such(example: str) -> str:
    return f"; give one such as {example}" if example else ""


def one_of(what: str, names: Sequence[str]) -> Callable[[str], str]:
    def check(text: str) -> str:
        plain = text.lower().replace("-", "_")
        for name in names:
            if plain == name.lower().replace("-", "_"):
                return name
        raise argparse.ArgumentTypeError(
            f"{text!r} is no {what}{meant(text, names) or '; there are ' + ', '.join(names)}"
        )

    check.names = tuple(names)  # type: ignore[attr-defined]
    return check


def byte_size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def meant(text: str, names: Iterable[str]) -> str:
    """'; did you mean X?' where one name is near."""
    near = difflib.get_close_matches(text.lower(), {n.lower(): n for n in names}, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


class Parser(argparse.ArgumentParser):
    """argparse whose every complaint is a UsageError of one sentence."""

    def error(self, message: str) -> Any:
        message = re.sub(r"^argument ([^:/]+)[^:]*: ", r"\1: ", message)
        message = re.sub(r"^(\S+): expected (?:one|at least one) argument$", r"\1 needs a value", message)
        message = re.sub(r"^(\S+): ignored explicit argument '?(.*?)'?$", r"\1 takes no value; \2 was given", message)
        raise UsageError(f"{message} (pcs {self.prog.split()[-1]} --help shows all flags)")


def parser_of(command: Command) -> Parser:
    """The command's parser; a flag that is not given leaves no trace, so that a configuration can fill it."""
    absent = argparse.SUPPRESS
    prog = f"pcs {command.name}"
    parser = Parser(prog=prog, usage=absent, add_help=False, allow_abbrev=False, argument_default=absent)
    for option in command.options + COMMON:
        if option.positional:
            parser.add_argument(option.key, nargs="*", type=option.kind)
        elif option.kind is None:
            parser.add_argument(option.name, action="store_true")
        else:
            parser.add_argument(option.name, type=option.kind, action="append" if option.many else "store")
    parser.add_argument("-h", "--help", action="store_true")
    return parser


def parse(command: Command, words: Sequence[str]) -> argparse.Namespace:
    """The flags that were given, and `notes`: what accepted flags of other programs do not need to do."""
    known, notes = known_names(command), []
    given: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            given += [word, *rest]
            break
        if not word.startswith("--"):
            given.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name in command.needless:
            notes.append(f"{word.partition('=')[0]} is not needed: {command.needless[name]}")
        elif name in command.translate:
            if not equals and not rest:
                raise UsageError(f"{name} needs a value")
            given += command.translate[name](value if equals else rest.pop(0))
        else:
            given.append(known.get(name, name) + equals + value)
    found, extra = parser_of(command).parse_known_intermixed_args(given)
    strange = [word.partition("=")[0] for word in extra if word.startswith("-")]
    if strange:
        names = [*known, *command.translate, *command.needless]
        hint = meant(strange[0], names) or f"; pcs {command.name} --help shows all flags"
        raise UsageError(f"{strange[0]} is no flag of pcs {command.name}{hint}")
    if extra:
        raise UsageError(f"pcs {command.name} does not know what to do with {extra[0]!r}; {command.usage}")
    for option in command.options:
        if option.positional and not getattr(found, option.key, None):
            vars(found).pop(option.key, None)
    found.notes = notes
    return found


def known_names(command: Command) -> dict[str, str]:
    """Every accepted flag, with dashes -> the command's own name of it."""
    names = {"--help": "--help"}
    for option in command.options + COMMON:
        if not option.positional:
            names |= dict.fromkeys((option.name, *(a.replace("_", "-") for a in option.also)), option.name)
    return names


def help_text(command: Command) -> str:
    """Usage, examples first, flags by group, other programs' names last."""
    width = min(shutil.get_terminal_size().columns, 108)
    lines = [f"pcs {command.name}: {command.about}", "", f"  {command.usage}", ""]
    lines += [*_wrapped(command.details, width, ""), ""] if command.details else []
    lines.append("Examples")
    for line, what in command.examples:
        lines += [*_wrapped(what, width, "  # "), f"  {line}"]
    groups = dict.fromkeys(o.group for o in command.options + COMMON if o.group != "hidden")
    for group in groups:
        lines += ["", group[0].upper() + group[1:]]
        for option in (o for o in command.options + COMMON if o.group == group):
            lines += _described(option, width)
    others = [f"--{o.key.replace('_', '-')}: {' '.join(o.also)}" for o in command.options if o.also]
    if others:
        lines += ["", "Also accepted: dashes or underscores, and the names of other trainers"]
        for other in others:
            lines += _wrapped(other, width, "  ", "      ")
        single = [f"--{n.lstrip('-').replace('-', '_')}" for n in (*command.translate, *command.needless)]
        lines += _wrapped(" ".join(single), width, "  ")
    return "\n".join(lines) + "\n"


def _described(option: Option, width: int) -> list[str]:
    left = option.metavar if option.positional else f"{option.name} {option.metavar}".rstrip()
    default = "" if option.default in (None, False, ()) else f" (default {option.default})"
    text = _wrapped(option.help + default, width, " " * 26)
    if len(left) < 23:
        return [f"  {left:<24}{text[0].strip()}", *text[1:]]
    return [f"  {left}", *text]


def _wrapped(text: str, width: int, indent: str, later: str | None = None) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent if later is None else later)
