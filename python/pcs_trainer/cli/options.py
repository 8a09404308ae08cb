"""Flag definitions: validation, aliases for other trainers' flags, "did you mean", help with examples first."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from ..errors import UsageError
from ..units import parse_bytes


@dataclass(frozen=True)
class Option:
    """One flag or, without dashes, a command's positional words.

    Args:
        name: as it is written, such as "--prior-weight".
        help: what it is, in a phrase.
        kind: text -> checked value; None is a flag without a value.
        default: its value where it is not given.
        metavar: the value's name in the help.
        also: the names it has in other trainers.
        many: it may be repeated.
        group: the help's heading above it.
        otherwise: what a default of None stands for, in the help's words.
        single: why it has one value, where several of its names could be taken for several values.
        dest: the attribute that holds its value, where its own name cannot be one.
        setting: the training setting that it is the value of.
        wins: those of its names whose value counts beside the others', as in the program that they come from.
    """

    name: str
    help: str
    kind: Callable[[str], Any] | None = str
    default: Any = None
    metavar: str = ""
    also: tuple[str, ...] = ()
    many: bool = False
    group: str = "options"
    otherwise: str = ""
    single: str = ""
    dest: str = ""
    setting: str = ""
    wins: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its name in configuration files."""
        return self.name.lstrip("-").replace("-", "_")

    @property
    def attribute(self) -> str:
        """Its name among the parsed options."""
        return self.dest or self.key

    @property
    def choices(self) -> tuple[str, ...]:
        """The only values it takes, where they can be listed."""
        return self.kind.names if isinstance(self.kind, OneOf) else ()

    @property
    def positional(self) -> bool:
        """Whether it is given as words, without a flag before them."""
        return not self.name.startswith("-")


@dataclass(frozen=True)
class Command:
    """A command's flags, examples and what it runs.

    Args:
        translate: other trainers' flags that are more than another name: value -> our flags.
        needless: other trainers' flags that are accepted and do nothing: flag -> why.
    """

    name: str
    about: str
    options: tuple[Option, ...]
    examples: tuple[tuple[str, str], ...]
    run: Callable[[argparse.Namespace], int]
    details: str = ""
    translate: Mapping[str, Callable[[str], list[str]]] = field(default_factory=dict)
    needless: Mapping[str, str] = field(default_factory=dict)

    @property
    def usage(self) -> str:
        """The command line's form in one line."""
        words = [f"{o.metavar} ..." if o.many else o.metavar for o in self.options if o.positional]
        return " ".join(["pcs", self.name, *words, "[flags]"])


def grouped(group: str, *options: Option) -> tuple[Option, ...]:
    """The options under one heading of the help."""
    return tuple(replace(option, group=group) for option in options)


COMMON = grouped(
    "always",
    Option("--config", "flags from a TOML file; the command line wins", metavar="run.toml"),
    Option("--debug", "show the traceback of an error", None, False),
)


def integer(least: int = 0, example: str = "", most: int | None = None) -> Callable[[str], int]:
    """A check of a flag's text: an integer from `least` to `most`, or without an end."""

    def check(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer{_such_as(example)}, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {value}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"expected an integer of at most {most:,}, got {value:,}")
        return value

    return check


def number(least: float | None = None, most: float | None = None, example: str = "") -> Callable[[str], float]:
    """A check of a flag's text: a number within bounds."""
    bounds = {"at least": least, "at most": most}
    words = " and ".join(f"{name} {bound:g}" for name, bound in bounds.items() if bound is not None)
    expected = f"expected a number{f' of {words}' if words else ''}{_such_as(example)}"

    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{expected}, got {text!r}") from None
        outside = (least is not None and value < least) or (most is not None and value > most)
        if math.isnan(value) or outside:
            raise argparse.ArgumentTypeError(f"{expected}, got {text}")
        return value

    return check


def _such_as(example: str) -> str:
    return f" such as {example}" if example else ""


@dataclass(frozen=True)
class OneOf:
    """A check of a flag's text: one of some names, in any case, with dashes or underscores."""

    what: str
    names: tuple[str, ...]

    def __call__(self, text: str) -> str:
        plain = text.lower().replace("-", "_")
        for name in self.names:
            if plain == name.lower().replace("-", "_"):
                return name
        hint = meant(text, self.names) or f"; choose from {', '.join(self.names)}"
        raise argparse.ArgumentTypeError(f"unknown {self.what} {text!r}{hint}")


def one_of(what: str, names: Iterable[str]) -> OneOf:
    """A check of a flag's text: one of the names; `what` is what they are names of."""
    return OneOf(what, tuple(names))


def byte_size(text: str) -> int:
    """A check of a flag's text: an amount of memory."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def meant(text: str, names: Iterable[str]) -> str:
    """'; did you mean X?' where one name is near."""
    # 0.6 is difflib's own cutoff: two swapped letters of five pass, another word of that length does not.
    near = difflib.get_close_matches(text.lower(), {n.lower(): n for n in names}, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


class Parser(argparse.ArgumentParser):
    """argparse whose every complaint is a UsageError of one sentence."""

    def error(self, message: str) -> NoReturn:
        """Say argparse's complaint in our words."""
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
            parser.add_argument(option.attribute, nargs="*", type=option.kind or str)
        elif option.kind is None:
            parser.add_argument(option.name, dest=option.attribute, action="store_true")
        else:
            action = "append" if option.many else "store"
            parser.add_argument(option.name, dest=option.attribute, type=option.kind, action=action)
    parser.add_argument("-h", "--help", action="store_true")
    return parser


def parse(command: Command, words: Sequence[str]) -> argparse.Namespace:
    """The flags that were given, and `notes`: why accepted flags of other trainers do nothing here."""
    given, notes = own_flags(command, words)
    found, extra = parser_of(command).parse_known_intermixed_args(given)
    strange = [word.partition("=")[0] for word in extra if word.startswith("-")]
    if strange:
        names = [*known_names(command), *command.translate, *command.needless]
        hint = meant(strange[0], names) or f"; pcs {command.name} --help shows all flags"
        raise UsageError(f"unknown flag {strange[0]} of pcs {command.name}{hint}")
    if extra:
        raise UsageError(f"unexpected word {extra[0]!r} after pcs {command.name}; usage: {command.usage}")
    for option in command.options:
        if option.positional and not getattr(found, option.attribute, None):
            vars(found).pop(option.attribute, None)
    found.notes = notes
    return found


def own_flags(command: Command, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words with other trainers' flags as our own, and a note for each flag that is not needed."""
    known = known_names(command)
    wins = {name.replace("_", "-") for option in command.options for name in option.wins}
    said = Said(command)
    given: list[str] = []
    last: list[str] = []  # what wins over all before it
    notes: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            given += [word, *rest]
            break
        if not word.startswith("--"):
            given.append(word)
            continue
        written, equals, value = word.partition("=")
        name = written.replace("_", "-")
        if name in command.needless:
            notes.append(f"{written} is not needed: {command.needless[name]}")
        elif name in command.translate:
            if not equals and not rest:
                raise UsageError(f"{name} needs a value")
            value = value if equals else rest.pop(0)
            ours = command.translate[name](value)
            if len(ours) == 2:
                said.note(ours[0], written, value, ours[1])
            given += ours
        elif name in wins and (equals or rest):
            last += [known[name], value if equals else rest.pop(0)]
        else:
            if equals or rest:
                said.note(known.get(name, name), written, value if equals else rest[0])
            given.append(known.get(name, name) + equals + value)
    said.check()
    at = given.index("--") if "--" in given else len(given)
    return given[:at] + last + given[at:], notes


class Said:
    """The values of flags with one value, by the names that they were given under."""

    def __init__(self, command: Command) -> None:
        options = command.options + COMMON
        self.single = {o.name: o for o in options if not o.positional and not o.many and o.kind is not None}
        self.values: dict[str, dict[str, tuple[str, str]]] = {}  # own name -> a name with dashes -> as written, value

    def note(self, own: str, written: str, text: str, value: str = "") -> None:
        """Take a flag and its text, which stands for `value` in our words; of one name the last counts."""
        if own in self.single and not text.startswith("--"):
            self.values.setdefault(own, {})[written.replace("_", "-")] = (f"{written} {text}", value or text)

    def check(self) -> None:
        """UsageError where two names of one option say two things: which of them is meant cannot be told."""
        for own, given in self.values.items():
            option, (first, *others) = self.single[own], given.values()
            for other in others:
                if _checked_or_text(option, first[1]) != _checked_or_text(option, other[1]):
                    raise two_values(option, first[0], other[0])


def two_values(option: Option, first: str, second: str) -> UsageError:
    """What is said where two names of one option have different values."""
    why = f": {option.single}" if option.single else ""
    return UsageError(f"{first} and {second} are both {option.name}, which has one value{why}. Fix: give one of them")


def _checked_or_text(option: Option, text: str) -> Any:
    """The value that a text stands for (1e-4 is 0.0001), or the text where it stands for none."""
    if option.metavar in ("FOLDER", "FILE", "PATH"):
        return os.path.normpath(text)
    try:
        return (option.kind or str)(text)
    except argparse.ArgumentTypeError:
        return text


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
    shown = option.kind is not None and option.default not in (None, "")
    number = isinstance(option.default, float)
    default = (f"{option.default:g}" if number else str(option.default)) if shown else option.otherwise
    text = _wrapped(option.help + (f" (default: {default})" if default else ""), width, " " * 26)
    if len(left) < 23:
        return [f"  {left:<24}{text[0].strip()}", *text[1:]]
    return [f"  {left}", *text]


def _wrapped(text: str, width: int, indent: str, later: str | None = None) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent if later is None else later)
