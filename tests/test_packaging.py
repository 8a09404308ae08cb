"""What an installed package holds, and what it says that it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"pcs_kernels": ROOT / "pcs_kernels", "pcs_trainer": ROOT / "python" / "pcs_trainer"}


def files(folder: Path) -> set[str]:
    """Every file below a folder but what Python and compilers leave there."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in paths if path.suffix not in (".so", ".pyc")}


def test_it_holds_both_packages_whole_and_nothing_else(tmp_path):
    pytest.importorskip("pybind11")  # needed to build
    left_out = shutil.ignore_patterns("*.so", "__pycache__")
    for path in (ROOT / "pcs_kernels", ROOT / "python", ROOT / "csrc"):
        shutil.copytree(path, tmp_path / path.name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    built = tmp_path / "built"
    assert {path.name for path in built.iterdir()} == set(FOLDERS)
    for name, source in FOLDERS.items():
        assert files(built / name) == files(source)


def test_its_version_is_said_once():
    stated = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (.+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    import pcs_kernels

    assert stated and cited and stated[1] == cited[1] == pcs_kernels.__version__
    assert f"\n## {stated[1]} - " in (ROOT / "CHANGELOG.md").read_text()


def test_what_the_tools_use_is_pinned():
    """Every package that `make setup` installs by name has one version in constraints.txt."""
    asked = re.findall(r"\$\(PIP\) install -q --no-compile -c constraints\.txt (.+)", (ROOT / "Makefile").read_text())
    names = {word for line in asked for word in line.split() if not word.startswith(("-", "$"))}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert names and names <= pinned
