"""Pages that are made from the code: the README's table of methods, docs/methods.md and docs/api/.

    python docs/generate.py            writes them
    python docs/generate.py --check    writes nothing; exit code 1 names what is out of date

Takes a quarter of a minute: what each method trains is counted on networks of Stable Diffusion 1.5 without contents.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import io
import sys
import tokenize
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks"), str(ROOT / "docs")]

from api_pages import anchor, escaped, kernels_page, trainer_page  # noqa: E402
from pcs_trainer.cli.commands.train_flags import OPTIONS  # noqa: E402
from pcs_trainer.memory.blank import BlankModel, BlankVocabulary  # noqa: E402
from pcs_trainer.memory.networks import networks_of  # noqa: E402
from pcs_trainer.methods import TITLES, method_named, settings_for  # noqa: E402
from pcs_trainer.methods.learner import Learner  # noqa: E402
from pcs_trainer.methods.start import learner_for  # noqa: E402
from pcs_trainer.settings import Settings, literal_choices  # noqa: E402
from registry import SD15  # noqa: E402

BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
NOTE = "<!-- Written by `make docs` from the code: edit the docstrings and comments there, not this page. -->"
FLAGS = {option.setting: option for option in OPTIONS if option.setting}
UNLISTED = ("method", "class_word", "token")  # words of the command, no numbers to choose
TYPES = {int: "integer", float: "number", str: "text", bool: "true or false"}


# What each method trains


@cache
def learned(method: str, rank: int | None = None) -> Learner:
    """A method's setup on Stable Diffusion 1.5 without contents, in bfloat16."""
    settings = settings_for(None, method, class_word="dog", token="<dog>", **({"rank": rank} if rank else {}))
    networks = networks_of(SD15)
    model = cast(Any, BlankModel(networks, torch.bfloat16, "meta", method))
    return learner_for(model, [settings], BlankVocabulary(networks, "meta", settings.token_vectors))


def counted(method: str) -> tuple[int, int, int]:
    """(parameters of layers, those of learned words, those of layers for each rank or 0 where there is no rank)."""
    layers, words = (sum(p.numel() for p in group.values()) for group in learned(method).groups())
    rank = getattr(method_named(method).settings(), "rank", None)
    if not rank:
        return layers, words, 0
    twice = sum(p.numel() for p in learned(method, 2 * rank).groups()[0].values())
    return layers, words, layers // rank if twice == 2 * layers else 0


def parameters(method: str) -> str:
    """The trainable parameters as the tables show them: "797,184 at rank 4 (199,296 per rank)"."""
    layers, words, per_rank = counted(method)
    rank = f" at rank {layers // per_rank} ({per_rank:,} per rank)" if per_rank else ""
    return " + ".join([*([f"{layers:,}{rank}"] if layers else []), *([f"{words:,}"] if words else [])])


def file_size(method: str) -> str:
    """Bytes of a concept file's tensors, for people."""
    learner = learned(method)
    kept = [row for word in learner.words.values() if word.kept for row in word.rows]
    size = sum(t.nbytes for t in [*learner.weights.values(), *learner.fixed.values(), *kept])
    if size >= 10**9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 10**6 else f"{size / 1e3:.0f} kB"


def methods_table(own_page: bool) -> str:
    """One row a method: titles lead to their sections here, or to the papers in the README."""
    lines = ["| method | trains | parameters (SD 1.5) | file | choose it for |", "|---|---|---|---|---|"]
    for name, title in TITLES.items():
        method = method_named(name)
        linked = f"[{title}]({f'#{anchor(title)}' if own_page else method.paper})"
        lines += [f"| {linked} | {method.trains} | {parameters(name)} | {file_size(name)} | {method.choose} |"]
    return "\n".join(lines)


# docs/methods.md


def methods_page() -> str:
    """The table, a section for each method, and the settings that all methods have."""
    lines = ["# Methods", "", METHODS_HEAD.strip(), "", methods_table(own_page=True), ""]
    for name, title in TITLES.items():
        lines += [f"## {title}", "", *method_section(name), ""]
    lines += ["## Settings of every method", "", SETTINGS_HEAD.strip(), "", *settings_table(Settings, {})]
    return "\n".join(lines) + "\n"


def method_section(name: str) -> list[str]:
    """The method file's docstring, and the settings that it has for itself or gives another default."""
    method = method_named(name)
    links = f"[paper]({method.paper}) · [source](../python/pcs_trainer/methods/{name}.py)"
    text = inspect.getdoc(sys.modules[method.setup.__module__]) or ""
    table = settings_table(method.settings, dict(method.tiny))
    return [f"`--method {name}` · {links}", "", "```text", text, "```", "", *table]


def settings_table(kind: type[Settings], tiny: dict[str, Any]) -> list[str]:
    """Of Settings itself every field; of a method's subclass those that are new or differ, and the embedded model's."""
    own, shared, defaults = kind is not Settings, Settings(), kind()
    columns = ["setting", "flag", "values", "default", *(["embedded model"] if own else []), "what it is"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    hints = get_type_hints(kind)
    for name in (field.name for field in dataclasses.fields(kind)):
        value = getattr(defaults, name)
        same = own and name not in tiny and value == getattr(shared, name, dataclasses.MISSING)
        if name in UNLISTED or same:
            continue
        flag = f"`{FLAGS[name].name}`" if name in FLAGS else ""
        small = [shown(tiny.get(name))] if own else []
        cells = [f"`{name}`", flag, values(hints[name]), shown(value), *small, meaning(kind, name)]
        lines += ["|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"]
    return lines


def values(kind: Any) -> str:
    """The choices, or the type in a word."""
    choices = literal_choices(kind)
    if choices:
        return ", ".join(f"`{c}`" for c in choices)
    return TYPES.get(kind) or next((TYPES[k] for k in getattr(kind, "__args__", ()) if k in TYPES), "")


def shown(value: Any) -> str:
    """A value as `--set` takes it; nothing for None and for no values at all."""
    if isinstance(value, tuple):
        value = "; ".join(value)
    return "" if value in (None, "") else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def meaning(kind: type, name: str) -> str:
    """The comment at the field, or at a parent's field of that name; else the help of its flag."""
    for owner in kind.__mro__:
        if dataclasses.is_dataclass(owner) and (found := comments(owner).get(name)):
            return escaped(found)
    return escaped(FLAGS[name].help) if name in FLAGS else ""


@cache
def comments(kind: type) -> dict[str, str]:
    """Field -> the comments on its lines."""
    source = inspect.getsource(kind)
    at = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and "fmt:" not in token.string
    }
    found = {}
    for node in cast(ast.ClassDef, ast.parse(source).body[0]).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            said = [at[line] for line in range(node.lineno, (node.end_lineno or node.lineno) + 1) if line in at]
            found[node.target.id] = " ".join(said)
    return found


METHODS_HEAD = """
Which one? [The FAQ says it in a paragraph.](faq.md#which-method-should-i-use) Parameters and files are counted on
Stable Diffusion 1.5 with each method's own defaults; a second number is the token embeddings of new words.

The defaults are the papers' values. A setting without a flag of its own is given as `--set name=value`, or as a keyword
of `Trainer`; one that only other methods have is refused with their names. The embedded model, a thousand times
smaller, trains with the values of its own column.
"""
SETTINGS_HEAD = "Where the default is empty, the method, the model or the kind of identifier decides."


# Writing


def pages() -> dict[Path, str]:
    """File -> its text."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    docs = ROOT / "docs"
    return {
        readme: f"{before}{BEGIN}\n{methods_table(own_page=False)}\n{END}{after}",
        docs / "methods.md": f"{NOTE}\n\n{methods_page()}",
        docs / "api" / "pcs_trainer.md": f"{NOTE}\n\n{trainer_page()}",
        docs / "api" / "pcs_kernels.md": f"{NOTE}\n\n{kernels_page()}",
    }


def main() -> int:
    """Write what differs, or name it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is out of date")
    check = parser.parse_args().check
    stale = {path: text for path, text in pages().items() if not path.is_file() or path.read_text() != text}
    for path, text in stale.items():
        print(f"{'out of date' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    if check and stale:
        print("run: make docs")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
