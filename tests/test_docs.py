"""What the docs say is so: pages made from code, links, commands, code, quoted messages, numbers, names."""

from __future__ import annotations

import ast
import csv
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pcs_trainer.cli.commands import COMMANDS, command
from pcs_trainer.cli.options import parse
from pcs_trainer.methods import TITLES
from pcs_trainer.unet.plans import PLAN_NAMES
from test_rooms import ROOMS, TRAINER, arrows, room

from pcs_kernels import diagnostics

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "examples" / "photos"
FOLDERS = ("docs", "examples", "pcs_kernels", "python", ".github")
PAGES = sorted({*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))})
README, DOCS = ROOT / "README.md", ROOT / "docs"
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of every fenced block."""
    yield from re.findall(r"^[ ]*```(\w*)\n(.*?)^[ ]*```", text, re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    text = re.sub(r"^[ ]*```.*?^[ ]*```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`", lambda found: "x" * len(found[0]), text)


# Pages made from code


@pytest.mark.slow
def test_the_pages_that_are_made_from_the_code_are_what_it_makes():
    line = [sys.executable, "docs/generate.py", "--check"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_api_pages_stay_small():
    assert sum(path.stat().st_size for path in (DOCS / "api").iterdir()) < 64_000


def test_the_readme_fits_a_few_screens():
    assert len(README.read_text().splitlines()) <= 150


# Links


@cache
def anchors(page: Path) -> set[str]:
    """The addresses of a page's headings, as GitHub makes them."""
    text = re.sub(r"^[ ]*```.*?^[ ]*```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: Counter[str] = Counter()
    made = set()
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.replace("`", "")).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        made.add(slug if not found[slug] else f"{slug}-{found[slug]}")
        found[slug] += 1
    return made


@pages
def test_every_link_leads_somewhere(page):
    wrong = []
    for link in re.findall(r"\]\(\s*([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target):
            wrong.append(f"{link}: no such heading; there are {', '.join(sorted(anchors(target)))}")
    assert not wrong, "\n".join(wrong)


def test_every_page_of_the_docs_is_reached_from_the_index_or_the_readme():
    start = [DOCS / "index.md", README]
    reached, left = set(start), list(start)
    while left:
        page = left.pop()
        for link in re.findall(r"\]\(\s*([^)\s#]+)", without_code(page.read_text())):
            target = (page.parent / link).resolve()
            found = sorted(target.glob("*.md")) if target.is_dir() else [target]
            new = [path for path in found if path.suffix == ".md" and path.is_file() and path not in reached]
            reached.update(new)
            left += new
    assert not set(DOCS.rglob("*.md")) - reached, "a page that nobody finds"


# Commands and code


def commands(page: Path) -> Iterator[str]:
    """The `pcs ...` lines of its code blocks and, in the README, of its table."""
    text = page.read_text()
    found = [line for language, code in blocks(text) if language in ("bash", "") for line in code.splitlines()]
    found += re.findall(r"\| `(pcs [^`]+)`", text) if page == README else []
    for line in found:
        line = re.sub(r"^torchrun .* -m pcs_trainer", "pcs", line.strip())
        if line.startswith("pcs ") and "COMMAND" not in line and line != "pcs ...":
            yield line


@pages
def test_every_command_is_one_that_pcs_takes(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my-photos", "my-dog", "my-cat"):
        os.symlink(PHOTOS, name)
    for line in commands(page):
        name, *words = shlex.split(line, comments=True)[1:]
        # A method that a page shows how to add is not here.
        words = ["personalized_residuals" if word == "bias_tuning" else word for word in words]
        if not name.startswith("-"):
            assert name in COMMANDS, line
            parse(command(name), words)


def test_every_target_of_make_is_there():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        said = re.findall(r"`make (\w+)`", page.read_text())
        said += [w for _, code in blocks(page.read_text()) for w in re.findall(r"^make (\w+)", code, re.MULTILINE)]
        assert set(said) <= targets, page


@pages
def test_every_block_of_python_parses(page):
    if page.parent.name == "api":
        pytest.skip("signatures")
    for language, code in blocks(page.read_text()):
        if language == "python":
            ast.parse(re.sub(r"^[ ]{2}(?=\S)", "", code) if code.startswith("  ") else code)


@pytest.mark.slow
def test_the_readmes_python_runs(tmp_path):
    (code,) = [code for language, code in blocks(README.read_text()) if language == "python"]
    assert code.count('out="out/mug")') == 1
    code = code.replace('out="out/mug")', 'out="out/mug", steps=2)').replace("lag=True)", "lag=True, steps=2)")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    paths = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=paths, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for made in ("mug/concept.safetensors", "mug/0.png", "mug/1.png", "for-comfyui/mug.safetensors"):
        assert (tmp_path / "out" / made).is_file()


@pytest.mark.slow
def test_the_method_that_a_page_adds_trains(model, tmp_path, monkeypatch):
    """docs/contributing/add-a-method.md: its file, as a module of the package, and its line."""
    import importlib.util

    from pcs_trainer import Trainer, methods, plan
    from pcs_trainer.memory.networks import networks_of

    code = next(code for language, code in blocks((DOCS / "contributing" / "add-a-method.md").read_text()))
    file = tmp_path / "bias_tuning.py"
    file.write_text(code)
    name = f"{methods.__name__}.bias_tuning"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(methods.TITLES, "bias_tuning", "Bias tuning")
    concept = Trainer(model, "bias_tuning", PHOTOS, class_word="mug", steps=20, batch=1, check_backend=True).train()
    assert concept.method == "bias_tuning" and all(name.endswith(".bias") for name in concept.tensors)
    assert plan(networks_of(model).unet, "bias_tuning", 64).fits


# Quoted messages


@cache
def messages() -> list[str]:
    """Every string of both packages in one line, with … for what is filled in."""
    found = []
    for package in ("pcs_kernels", "python/pcs_trainer"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                    found.append(" ".join("".join(parts).split()))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(" ".join(node.value.split()))
    return found


def quoted() -> list[str]:
    """The sentences that docs/troubleshooting.md explains."""
    text = (DOCS / "troubleshooting.md").read_text()
    quotes = re.findall(r"^> (.+(?:\n> .+)*)", text, re.MULTILINE)
    return [" ".join(re.sub(r"^> ", "", quote, flags=re.MULTILINE).split()) for quote in quotes]


@pytest.mark.parametrize("quote", quoted())
def test_a_message_that_is_explained_is_one_that_is_raised(quote):
    pattern = re.compile(".*".join(map(re.escape, quote.split("…"))))
    assert any(pattern.search(message) for message in messages()), f"no message says: {quote}"


# Numbers and names


def counted(model: str, method: str, budget: str) -> tuple[str, str]:
    """(GB of the whole run, rounded up, and the batch) that benchmarks/memory.py counted within a budget."""
    with (ROOT / "benchmarks" / "results" / "memory.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["what"], row["model"], row["method"], row["budget_gb"]) == ("budget", model, method, budget):
                megabytes = round(1000 * float(row["run_gb"]))
                return f"{-(-megabytes // 10) / 100:.2f} GB", row["pictures"]
    raise AssertionError(f"{model}, {method}, {budget} GB was not counted")


@pytest.mark.parametrize("model, budget", [("SD1.5", "8"), ("SDXL", "12")])
def test_the_readmes_quickstart_has_the_memory_that_is_counted_for_its_command(model, budget):
    (row,) = [line for line in README.read_text().splitlines() if f"--budget {budget}GB" in line]
    used, _ = counted(model, "personalized_residuals", budget)
    assert row.endswith(f"| {used} |")
    assert "--method" not in row and "--batch" not in row, "the default method, at its own batch"


def test_the_gpu_quickstart_has_the_memory_that_is_counted():
    text = (DOCS / "quickstart-gpu.md").read_text()
    for method in ("personalized_residuals", "textboost", "custom_diffusion", "dreambooth"):
        title = TITLES[method]
        used, images = counted("SD1.5", method, "12")  # every method's own batch fits there, as fast as it goes
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
        assert used in row.split("|")[3] and images.replace("+", " + ") in row.split("|")[3], row
    for budget in ("8", "12"):
        assert counted("SDXL", "personalized_residuals", budget)[0] in text


def test_the_readmes_hardware_table_names_every_op():
    table = README.read_text().split("## Hardware")[1].split("##")[0]
    named = [name for line in table.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line)]
    assert sorted(named) == diagnostics.op_names()


def test_the_readmes_tree_and_the_tour_name_every_room():
    folders = {path.name for path in (ROOT / "python" / "pcs_trainer").iterdir() if (path / "__init__.py").is_file()}
    tree = README.read_text().split("## Repository")[1]
    assert {name for name in folders if f"{name}/" not in tree} == set()
    tour = (DOCS / "how-it-works.md").read_text()
    rooms = {room for line in ROOMS for room in line.split()} - {"__main__"}
    assert {room for room in rooms if not re.search(rf"\b{re.escape(room)}\b", tour)} == set()


def test_the_tours_arrows_are_the_imports():
    ground = set(ROOMS[0].split())
    found: dict[str, set[str]] = {}
    for arrow in arrows(TRAINER):
        if arrow.source and arrow.target:
            source, target = room(arrow.source)[1], room(arrow.target)[1]
            found.setdefault(source, set()).update({target} - {source} - ground)
    tour = (DOCS / "how-it-works.md").read_text()
    table = tour.split("| room |")[1].split("\n\n")[0]
    for name, said in re.findall(r"^\| `(\w+)` \| [^|]+ \| ?([^|]*) ?\|$", table, re.MULTILINE):
        rooms = {word for word in re.split(r"[, ]+", said) if word}
        if name != "cli":
            assert rooms == found.get(name, set()), f"{name} imports {', '.join(sorted(found.get(name, set())))}"
    assert found["cli"] | {"cli"} == {r for line in ROOMS[1:] for r in line.split()} - {"tiny.make", "__main__"}


def test_the_tour_names_the_recomputation_plans():
    tour = (DOCS / "how-it-works.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", tour, re.MULTILINE)
    assert {short: long for long, short in rows} == PLAN_NAMES
