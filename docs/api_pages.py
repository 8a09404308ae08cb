"""The pages of docs/api/: every public name with its signature and docstring, as Markdown."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pcs_trainer

import pcs_kernels
import pcs_kernels.costs
import pcs_kernels.diagnostics

SECTIONS = ("Args:", "Returns:", "Raises:")
WIDTH = 100  # columns of a signature before each argument gets a line of its own

TRAINER_HEAD = "The public names of the trainer: `from pcs_trainer import load_model, Trainer, sample`."
KERNELS_HEAD = (
    "The public names of the kernels. The functions at the top take and return tensors on any device; what a module's\n"
    "docstring says of shapes, and of what is kept for the backward pass, stands under each."
)


def trainer_page() -> str:
    """docs/api/pcs_trainer.md"""
    return page("pcs_trainer", TRAINER_HEAD, [(name, getattr(pcs_trainer, name)) for name in pcs_trainer.__all__])


def kernels_page() -> str:
    """docs/api/pcs_kernels.md: the functions at the top, then those of the public submodules."""
    entries = list(public(pcs_kernels))
    for module in (pcs_kernels.optim, pcs_kernels.nn, pcs_kernels.diagnostics, pcs_kernels.costs):
        entries += [(f"{module.__name__.removeprefix('pcs_kernels.')}.{name}", found) for name, found in public(module)]
    return page("pcs_kernels", KERNELS_HEAD, entries)


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The documented functions and classes of a module that are its package's own."""
    for name, found in vars(module).items():
        plain = inspect.unwrap(found) if callable(found) else found
        at_home = getattr(plain, "__module__", "").startswith(module.__name__)
        if not name.startswith("_") and at_home and (inspect.isfunction(plain) or inspect.isclass(plain)):
            yield name, plain


def page(title: str, about: str, entries: list[tuple[str, Any]]) -> str:
    """One page: a line of links, then every entry."""
    lines = [f"# {title}", "", about, ""]
    anchors = [anchor(name) for name, _ in entries]
    # Plan and plan: GitHub numbers the headings whose address is taken
    unique = [a if a not in anchors[:i] else f"{a}-{anchors[:i].count(a)}" for i, a in enumerate(anchors)]
    lines += [" · ".join(f"[`{name}`](#{a})" for (name, _), a in zip(entries, unique, strict=True)), ""]
    for name, found in entries:
        lines += [f"## {name}", "", "```python", *declaration(found), "```", "", *prose(found), ""]
        module = sys.modules[found.__module__]
        if found.__module__.startswith("pcs_kernels.ops.") and inspect.getdoc(module):
            lines += ["```text", inspect.getdoc(module) or "", "```", ""]
        for member, value in members(found):
            lines += [f"**`{member_line(member, value)}`**", "", *prose(inner(value)), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def anchor(heading: str) -> str:
    """The address that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# Signatures, as the source has them


def source_of(found: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(found))).body[0]


def declaration(found: Any) -> list[str]:
    """A function's signature; of a class its fields with their comments, or its __init__'s signature."""
    if not inspect.isclass(found):
        return call(source_of(found))
    node = source_of(found)
    assert isinstance(node, ast.ClassDef)
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    head = f"class {found.__name__}{f'({bases})' if bases else ''}"
    made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    if made:
        return [*call(made[0], f"class {found.__name__}")]
    if dataclasses.is_dataclass(found) or "NamedTuple" in bases:
        source = textwrap.dedent(inspect.getsource(found)).split("\n")
        kept = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        return [f"{head}:", *(line for n in kept for line in source[n.lineno - 1 : n.end_lineno])]
    return [head]


def call(node: ast.AST, name: str = "", wide: bool = False) -> list[str]:
    """name(arguments) -> what it returns; one argument a line where it is long, unless `wide`."""
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    given = [spaced(part) for part in split(ast.unparse(node.args), ",") if part not in ("self", "cls")]
    back = f" -> {ast.unparse(node.returns)}" if node.returns is not None and not name else ""
    line = f"{name or node.name}({', '.join(given)}){back}"
    if len(line) <= WIDTH or wide:
        return [line]
    return [f"{name or node.name}(", *(f"    {part}," for part in given), f"){back}"]


def spaced(argument: str) -> str:
    """x: int = 3, with spaces around the sign."""
    return " = ".join(split(argument, "=")) if ":" in argument else argument


def split(text: str, at: str) -> list[str]:
    """The parts between the signs that are in no bracket and no string."""
    parts, depth, quote, start = [], 0, "", 0
    for i, letter in enumerate(text):
        if letter in "'\"":
            quote = "" if quote == letter else quote or letter
        depth += (letter in "([{") - (letter in ")]}")
        if letter == at and not depth and not quote:
            parts, start = [*parts, text[start:i].strip()], i + 1
    return [*parts, text[start:].strip()]


def members(found: Any) -> list[tuple[str, Any]]:
    """The public methods and properties that a class itself documents; `forward` is its call."""
    if not inspect.isclass(found):
        return []
    own = ((name, value) for name, value in vars(found).items() if not name.startswith("_") and name != "forward")
    return [(name, value) for name, value in own if inner(value) is not None and inspect.getdoc(inner(value))]


def inner(value: Any) -> Any:
    """The function behind a member; None where it is none."""
    if isinstance(value, property):
        return value.fget
    plain = inspect.unwrap(value.__func__ if isinstance(value, (staticmethod, classmethod)) else value)
    return plain if inspect.isfunction(plain) else None


def member_line(name: str, value: Any) -> str:
    if isinstance(value, property):
        return name
    node = next(n for n in ast.walk(source_of(inner(value))) if isinstance(n, ast.FunctionDef))
    return " ".join(call(node, wide=True)[0].split())


# Docstrings


def prose(found: Any) -> list[str]:
    """A docstring as Markdown: paragraphs, Args and Raises as lists, indented blocks as code."""
    if inspect.isclass(found) and "__doc__" in vars(found) and re.match(rf"{found.__name__}\(", found.__doc__ or ""):
        return []  # a dataclass without a docstring has its signature for one
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.getdoc(found) or ""):
        first, *rest = block.split("\n")
        if first.strip() in SECTIONS:
            lines += [f"{first.strip()[:-1]}:", "", *listed(first.strip(), rest), ""]
        elif first.startswith("    "):
            lines += ["```text", textwrap.dedent(block), "```", ""]
        else:
            lines += [escaped(" ".join(block.split())), ""]
    return lines[:-1]


def listed(section: str, lines: list[str]) -> list[str]:
    """`name: what it is` lines as a list; the lines of a Returns section as a paragraph."""
    if section == "Returns:":
        return [escaped(" ".join(" ".join(lines).split()))]
    items: list[str] = []
    for line in lines:
        named = re.match(r" {4}(\*{0,2}\w[\w, ]*): (.*)", line)
        if named:
            items += [f"- `{named[1]}`: {escaped(named[2])}"]
        elif items:
            items[-1] += f" {escaped(line.strip())}"
        else:
            items += [escaped(line.strip())]
    return items


def escaped(text: str) -> str:
    """Words such as <mug>, and | in tables, as they are; what stands in backticks stays."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([<>|*])", r"\\\1", part) for part in parts)
