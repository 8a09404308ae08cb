"""The house: which room may import which, no circles, and no name that is a module's and something else's too."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TRAINER = ROOT / "python" / "pcs_trainer"

# A room may import itself and the rooms before it; nothing else. "" is the face, __main__ the door.
ROOMS = [
    "errors units files run_folder version settings machine distributed",  # the ground floor: single files
    "tiny",  # the embedded model: a world of its own
    "unet",
    "model",
    "concept",
    "sampling",
    "data",  # class pictures are drawn
    "methods",
    "training",  # previews are drawn
    "memory",  # a step is rehearsed
    "evaluation",
    "report",
    "cli __main__",
    "tiny.make",  # imported by nobody
]

# Concept.load, .compress and .export forward to the functions of those names, which stand above Concept and need it.
# These edges, each an import inside a method, are the only ones that may close a circle or enter a leaf.
SUGAR = {
    ("concept.concept", "concept.loading"),
    ("concept.concept", "concept.compression"),
    ("concept.concept", "concept.formats.writing"),
}


class Arrow(NamedTuple):
    """One import statement between two modules of a package."""

    source: str
    target: str
    where: str  # file:line


def modules(package: Path) -> dict[str, Path]:
    """Dotted name under the package -> file; "" is the package's own __init__."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(node: ast.AST, name: str, inside: str) -> Iterator[tuple[str, str]]:
    """(module under the package, the name taken from it) of one import statement; `inside` is the importing package."""
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if node.level:
            base = inside.split(".") if inside else []
            kept = base[: len(base) - node.level + 1]
            yield from ((".".join([*kept, *filter(None, [module])]), alias.name) for alias in node.names)
        elif module.split(".")[0] == name:
            yield from ((module[len(name) + 1 :], alias.name) for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from ((a.name[len(name) + 1 :], "") for a in node.names if a.name.split(".")[0] == name)


@functools.cache
def arrows(package: Path) -> tuple[Arrow, ...]:
    """Every import between the package's modules: at the top, in functions, and under TYPE_CHECKING."""
    files, found = modules(package), []
    for name, path in files.items():
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            for module, taken in imported(node, package.name, inside):
                submodule = f"{module}.{taken}".lstrip(".")
                target = submodule if submodule in files else module
                if target in files and target != name:
                    found.append(Arrow(name, target, f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"))
    return tuple(found)


def room(module: str) -> tuple[int, str]:
    """A module's floor and its room's name."""
    if module == "tiny.make" or module.startswith("tiny.make."):
        return len(ROOMS) - 1, "tiny.make"
    top = module.split(".")[0]
    for floor, names in enumerate(ROOMS):
        if top in names.split():
            return floor, top
    raise AssertionError(f"{module} belongs to no room: add its folder to ROOMS, or move it into one")


def circles(pairs: set[tuple[str, str]]) -> list[list[str]]:
    """The groups of modules that import each other around a ring (strongly connected components, Tarjan)."""
    after: dict[str, list[str]] = {}
    for a, b in sorted(pairs):
        after.setdefault(a, []).append(b)
        after.setdefault(b, [])
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(v: str) -> None:
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in after[v]:
            if w not in index:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], index[w])
        if low[v] == index[v]:
            ring = []
            while not ring or ring[-1] != v:
                ring.append(stack.pop())
            if len(ring) > 1:
                found.append(sorted(ring))

    for v in after:
        if v not in index:
            visit(v)
    return found


def test_every_room_imports_only_the_rooms_before_it():
    wrong = []
    for arrow in arrows(TRAINER):
        if arrow.source == "":  # the face imports nothing by name; its rooms are strings
            wrong.append(f"{arrow.where}: the face must import a room only when one of its names is used")
            continue
        if arrow.target == "":
            wrong.append(f"{arrow.where}: {arrow.source} imports the face; import the room itself")
            continue
        (from_floor, source), (to_floor, target) = room(arrow.source), room(arrow.target)
        if to_floor > from_floor:
            wrong.append(f"{arrow.where}: {source} must not import {target} ({arrow.source} -> {arrow.target})")
    assert not wrong, "\n".join(wrong)


def test_other_rooms_see_a_folder_by_its_modules_and_nobody_sees_the_scripts_that_made_the_embedded_model():
    wrong = [a.where for a in arrows(TRAINER) if room(a.target)[1] == "tiny.make" != room(a.source)[1]]
    assert not wrong, f"tiny.make is imported: {', '.join(wrong)}"


def test_a_concept_knows_nothing_of_other_tools_files():
    """concept.formats stands on concept, and concept imports nothing from it but for the named forwards."""
    wrong = [
        f"{a.where}: {a.source} must not import {a.target}"
        for a in arrows(TRAINER)
        if a.target.startswith("concept.formats")
        and a.source.startswith("concept")
        and not a.source.startswith("concept.formats")
        and (a.source, a.target) not in SUGAR
    ]
    assert not wrong, "\n".join(wrong)


def test_every_named_forward_is_still_there():
    assert {(a.source, a.target) for a in arrows(TRAINER)} >= SUGAR, "take the edges that are gone out of SUGAR"


@pytest.mark.parametrize("package", ["python/pcs_trainer", "pcs_kernels"])
def test_no_circle_of_imports(package):
    pairs = {(a.source, a.target) for a in arrows(ROOT / package)} - SUGAR
    assert not circles(pairs), "modules import each other: " + "; ".join(map(" -> ".join, circles(pairs)))


def test_no_circle_among_the_benchmarks():
    folder = ROOT / "benchmarks"
    names, pairs = modules(folder), set()
    for name, path in names.items():
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                taken = imported(node, "benchmarks", inside)
            elif isinstance(node, ast.ImportFrom):
                taken = iter([(node.module or "", alias.name) for alias in node.names])
            elif isinstance(node, ast.Import):
                taken = iter([(alias.name, "") for alias in node.names])
            else:
                continue
            for module, what in taken:
                target = f"{module}.{what}" if f"{module}.{what}" in names else module
                if target in names and target != name:
                    pairs.add((name, target))
    assert not circles(pairs), "benchmarks import each other: " + "; ".join(map(" -> ".join, circles(pairs)))


def test_a_file_is_a_noun_and_what_it_exports_has_another_name():
    """`from package import name` must never find a module where a function of that name was meant."""
    wrong = []
    for package in (TRAINER, ROOT / "pcs_kernels"):
        files = modules(package)
        for name, path in files.items():
            if path.name != "__init__.py":
                continue
            beside = {m[len(name) + 1 :] if name else m for m in files if m != name and m.rpartition(".")[0] == name}
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in beside:
                    wrong.append(f"{path.relative_to(ROOT)} defines {node.name}, which is also a module beside it")
                if isinstance(node, ast.ImportFrom):
                    for alias in node.names:
                        module = ".".join(filter(None, [node.module or "", alias.name]))
                        is_submodule = node.level == 1 and module in beside
                        if (alias.asname or alias.name) in beside and not is_submodule:
                            wrong.append(
                                f"{path.relative_to(ROOT)} exports {alias.name}, the name of a module beside it"
                            )
    assert not wrong, "\n".join(wrong)
