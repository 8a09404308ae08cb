"""The example scripts run as a reader would run them, and say what they are said to say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script(name: str, *words: str, cwd: Path) -> str:
    paths = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    line = [sys.executable, str(ROOT / "examples" / name), *words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=paths, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_one_kernel_agrees_with_plain_torch(tmp_path):
    said = script("one_kernel.py", cwd=tmp_path)
    differences = [float(x) for x in re.findall(r"difference (?:of a gradient )?(\S+?);?\s", said)]
    assert len(differences) == 2 and all(d < 1e-4 for d in differences)
    assert "[2, 1, 256]" in said


@pytest.mark.slow
def test_train_and_sample_leaves_a_concept_and_three_pictures(tmp_path):
    said = script("train_and_sample.py", "3", cwd=tmp_path)
    assert said.count(" shows a <mug> mug ") == 3 and "[3/3] done" in said
    made = {file.name for file in (tmp_path / "out" / "example").iterdir()}
    assert {"concept.safetensors", "beach.png", "snow.png", "night.png"} <= made


@pytest.mark.slow
def test_the_embedded_trainer_stops_when_asked_and_saves(tmp_path):
    said = script("embed_trainer.py", "0.5", cwd=tmp_path)
    assert re.search(r"stopped: \d+ steps of textboost", said)
    steps = int(re.search(r"(\d+) steps of textboost: [\d,]+ parameters for '<mug>'", said)[1])
    assert 1 <= steps < 250
    assert (tmp_path / "out" / "embedded" / "concept.safetensors").is_file()


def test_every_script_is_short_and_run_here():
    scripts = {file.name for file in (ROOT / "examples").glob("*.py")}
    source = Path(__file__).read_text()
    assert scripts and all(f'script("{name}"' in source for name in scripts)
    assert all(len((ROOT / "examples" / name).read_text().splitlines()) <= 70 for name in scripts)
