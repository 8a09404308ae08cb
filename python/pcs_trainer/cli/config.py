"""Configurations: flags from a TOML file, and the effective ones written beside every result."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import written_text
from .options import COMMON, Command, Option, known_names, meant, two_values


def _toml_reader() -> Any:
    """The standard library's tomllib, or tomli, which it came from and Python 3.10 needs."""
    for name in ("tomllib", "tomli"):
        if find_spec(name):
            return import_module(name)
    raise UsageError("--config needs tomli on Python 3.10. Fix: pip install tomli")


def read_config(path: Path, command: Command) -> dict[str, Any]:
    """The checked values of a file: keys are the flags' names, at the top or in a table named like the command."""
    tomllib = _toml_reader()
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"--config: {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {path} is invalid TOML: {error}") from None
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    loose = {key: value for key, value in table.items() if not isinstance(value, dict)}
    by_key = {option.key: option for option in command.options + COMMON}
    names = {name.lstrip("-").replace("-", "_"): own for name, own in known_names(command).items()}
    values: dict[str, Any] = {}
    for level in (loose, tables.get(command.name, {})):  # what stands in the command's own table wins
        winning: dict[str, Any] = {}
        said: dict[str, tuple[str, Any]] = {}  # attribute -> the key that said it, and its value
        for key, value in level.items():
            plain = key.replace("-", "_")
            option = by_key.get(plain) or by_key.get(names.get(plain, "").lstrip("-").replace("-", "_"))
            if option is None or option.key == "config":
                hint = meant(plain, by_key) or f"; pcs {command.name} --help shows all"
                raise UsageError(f"--config: {path} sets {key!r}, which is not a flag of pcs {command.name}{hint}")
            checked = _checked(option, value, path)
            other, before = said.setdefault(option.attribute, (key, checked))
            if plain in {name.lstrip("-").replace("-", "_") for name in option.wins}:
                winning[option.attribute] = checked
            elif before != checked and not option.many and option.attribute not in winning:
                wrong = two_values(option, f"{other} = {toml(before)}", f"{key} = {toml(checked)}")
                raise UsageError(f"--config: {path}: {wrong}")
            values[option.attribute] = checked
        values |= winning
    return values


def _checked(option: Option, value: Any, path: Path) -> Any:
    if option.kind is None:
        if not isinstance(value, bool):
            raise UsageError(f"--config: {path} sets {option.key} to {value!r}; it must be true or false")
        return value
    many = option.many or option.positional
    values = value if many and isinstance(value, list) else [value]
    try:
        checked = [option.kind(v if isinstance(v, str) else str(v)) for v in values]
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--config: {path}, {option.key}: {error}") from None
    return checked if many else checked[0]


def effective(command: Command, given: argparse.Namespace) -> argparse.Namespace:
    """The command line over the configuration over the defaults."""
    config = getattr(given, "config", None)
    values = {option.attribute: option.default for option in command.options + COMMON}
    from_config = read_config(Path(config), command) if config else {}
    values |= from_config
    values |= vars(given)
    # What the file alone says: a run.toml of version 0.1.0 may hold flags that its method does not use.
    return argparse.Namespace(**values, from_config=from_config.keys() - vars(given).keys())


def write_config(
    path: Path, command: Command, options: argparse.Namespace, without: tuple[str, ...] = (), **extra: Any
) -> Path:
    """The effective configuration as TOML: `pcs COMMAND --config FILE` does the same again."""
    lines = [f"# pcs {command.name} --config {path.name}", "", f"[{command.name}]"]
    for option in command.options:
        value = extra.get(option.key, getattr(options, option.attribute, None))
        if option.key not in without and value is not None and value is not False and value not in ([], ""):
            lines.append(f"{option.key} = {toml(value)}")
    return written_text(path, "\n".join(lines) + "\n")


def keep_config(
    path: Path, command: Command, options: argparse.Namespace, without: tuple[str, ...] = (), **extra: Any
) -> None:
    """`write_config` after the work is done: where it cannot be written, a remark and not a failure."""
    try:
        write_config(path, command, options, without, **extra)
    except OSError as error:
        print(f"pcs: {path} could not be written ({error.strerror}); all else is there", file=sys.stderr, flush=True)


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml(v) for v in value) + "]"
    return json.dumps(str(value), ensure_ascii=False)  # JSON's strings are TOML's basic strings
