"""Rules of this repository that no linter knows:  python tests/house_rules.py names each line that breaks one.

Standard library alone, so that a commit hook is quick; tests/test_house_rules.py runs the same rules.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPELLED_HERE = {"tests/house_rules.py", "tests/test_house_rules.py"}
FOLDERS = ["benchmarks", "csrc", "docs", "examples", "pcs_kernels", "python", "tests", ".ci", ".github"]
TEXT = {".py", ".pyi", ".cpp", ".h", ".md", ".toml", ".yml", ".yaml", ".cff", ".json", ".csv", ".html", ".txt", ""}

LONGEST_FILE, LONGEST_FUNCTION = 380, 75  # aim for 350 and 60; a function's signature and docstring do not count

# Lines that may say `fmt: skip` or `fmt: off`: tables of data. A number may fall and never rise.
HAND_FORMATTED: dict[str, int] = {
    "benchmarks/quality/jobs.py": 1,
    "python/pcs_trainer/cli/commands/sample.py": 1,
    "python/pcs_trainer/cli/commands/train_flags.py": 1,
    "tests/test_bad_pictures.py": 1,
    "tests/test_demo.py": 1,
    "tests/test_dispatch.py": 1,
    "tests/test_doctor.py": 1,
    "tests/test_face.py": 1,
    "tests/test_family_training.py": 1,
    "tests/test_grammar.py": 3,
    "tests/test_malformed_calls.py": 1,
    "tests/test_memory_plan.py": 5,
    "tests/test_methods.py": 3,
    "tests/test_model_loading.py": 3,
    "tests/test_sampling.py": 1,
}

# Whoever else names data_ptr compares addresses, and hands none to native code.
TAKES_ADDRESSES = (
    "pcs_kernels/_native.py",
    "pcs_kernels/_packed.py",
    "pcs_kernels/ops/adamw8bit/op.py",
    "pcs_kernels/ops/adamw8bit/many.py",  # a table of addresses, for Triton
)


def files() -> Iterator[Path]:
    """Every text file of the repository."""
    for path in [*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]:
        if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts:
            yield path


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python(*folders: str) -> Iterator[Path]:
    """The Python files of some folders, or of all."""
    for path in files():
        if path.suffix == ".py" and (not folders or name(path).startswith(folders)):
            yield path


def matches(pattern: str, paths: Iterator[Path], reason: str) -> Iterator[str]:
    for path in paths:
        if name(path) in SPELLED_HERE:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(pattern, line):
                yield f"{name(path)}:{number}: {reason}"


def addresses_are_taken_in_one_place() -> Iterator[str]:
    others = (path for path in python("pcs_kernels/") if name(path) not in TAKES_ADDRESSES)
    yield from matches(r"\bdata_ptr\b", others, "only pcs_kernels/_native.py takes addresses")


def kernels_know_no_trainer() -> Iterator[str]:
    for path in python("pcs_kernels/"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for found in {part.split(".")[0] for part in names} & {"pcs_trainer", "diffusers", "transformers"}:
                yield f"{name(path)}: pcs_kernels must not import {found}"


def only_tables_are_formatted_by_hand() -> Iterator[str]:
    found = {}
    for path in python():
        count = len(re.findall(r"# fmt: (?:skip|off)\b", path.read_text(encoding="utf-8")))
        if count and name(path) not in SPELLED_HERE:
            found[name(path)] = count
    for path in sorted(found | HAND_FORMATTED):
        now, allowed = found.get(path, 0), HAND_FORMATTED.get(path, 0)
        if now > allowed:
            yield f"{path}: {now} lines are formatted by hand, {allowed} may be; let ruff format the new ones"
        elif now < allowed:
            yield f"{path}: {now} lines are formatted by hand; lower its number in HAND_FORMATTED from {allowed}"


def functions_have_names() -> Iterator[str]:
    yield from matches(r"noqa:.*E731", python(), "a lambda with a name is a function: use def")


def nothing_names_a_machine() -> Iterator[str]:
    reason = "a path of one machine; use a relative path or an invented name"
    yield from matches(r"(?<![\w.}~])/(?:work|root|home|Users|tmp)/\w", files(), reason)


def nothing_is_left_to_do() -> Iterator[str]:
    yield from matches(r"\b(?:TODO|FIXME|XXX)\b", files(), "finish it, or say what is so and why")


def files_are_short() -> Iterator[str]:
    for path in python():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST_FILE:
            yield f"{name(path)}: {lines} lines, the limit is {LONGEST_FILE}; split it"


def functions_are_short() -> Iterator[str]:
    for path in python():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1 if ast.get_docstring(node) is not None and len(node.body) > 1 else 0]
                lines = node.end_lineno - first.lineno + 1
                if lines > LONGEST_FUNCTION:
                    yield f"{name(path)}:{node.lineno}: {node.name} has {lines} lines, the limit is {LONGEST_FUNCTION}"


def toml_parses() -> Iterator[str]:
    try:
        import tomllib
    except ImportError:  # Python 3.10 has none; later versions look
        return
    for path in files():
        if path.suffix == ".toml":
            try:
                tomllib.loads(path.read_text(encoding="utf-8"))
            except tomllib.TOMLDecodeError as error:
                yield f"{name(path)}: {error}"


def messages_speak_the_fields_english() -> Iterator[str]:
    """ "X is no whole number" -> "expected an integer, got X"; "mend: ..." -> "Fix: ..."."""
    wrong = re.compile(r"\bmend:|(?<!there )\bis no (?!larger|smaller|longer|more|less)", re.IGNORECASE)
    for path in python("pcs_kernels/", "python/"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and (found := wrong.search(node.value)):
                yield f"{name(path)}:{node.lineno}: {found[0].strip()!r}; write 'expected a ...' or 'Fix: ...'"


RULES: list[Callable[[], Iterator[str]]] = [
    addresses_are_taken_in_one_place,
    kernels_know_no_trainer,
    only_tables_are_formatted_by_hand,
    functions_have_names,
    nothing_names_a_machine,
    nothing_is_left_to_do,
    files_are_short,
    functions_are_short,
    toml_parses,
    messages_speak_the_fields_english,
]


if __name__ == "__main__":
    broken = [line for rule in RULES for line in rule()]
    print("\n".join(broken) or f"{len(RULES)} house rules are kept")
    sys.exit(bool(broken))
