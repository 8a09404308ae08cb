"""What the README claims is what the results files say, and its code runs."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import memory
import plot
import roofline
import step_methods
import super_resolution
from pcs_trainer.methods import TITLES
from pcs_trainer.tiny.subjects import photos
from quality import jobs

from benchmarks.gpu import commands, methods

ROOT = Path(__file__).parents[1]
SCRIPTS = ("float16.py", "gpu", "lag.py", "memory.py", "own_prior.py", "plot.py", "quality", "roofline.py", "run.py")
SCRIPTS += ("host_time.py", "step.py", "step_methods.py", "super_resolution.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_what_it_measures_how_long_it_takes_and_what_it_writes(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])  # the scripts put their folders there
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert re.search(r"takes (about|a few|seconds|on a card)", said, re.IGNORECASE), "how long does it take?"
    assert re.search(r"benchmarks/results/|docs/|--out folder", said), "what does it write?"


def test_the_emblem_is_where_a_photo_changes_without_it():
    shots = photos(101, 3)
    marks = [super_resolution.emblem_of(shot.scene) for shot in shots]
    assert all(0 < mark.mean() < 0.1 for mark in marks)


def test_paired_differences_are_of_the_subjects_that_both_settings_have():
    def row(subject, setting, noise, similarity):
        measures = {"subject_similarity": similarity, "emblem_error": "0.1", "psnr": "20"}
        return {"subject": subject, "setting": setting, "noise": noise} | measures

    rows = [row("1", "up-scaler", "1e-05", "0.5"), row("1", "fine-tuned", "1e-05", "0.75")]
    rows += [row("2", "up-scaler", "1e-05", "0.1")]
    shown = super_resolution.table(rows).splitlines()
    (line,) = [line for line in shown if line.startswith("fine-tuned - up-scaler")]
    assert line.split()[4:] == ["0.250", "0.000", "0.000", "1"]


def test_quality_runs_as_a_module_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quality", "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks.quality", run_name="__main__")
    assert ended.value.code == 0 and "--minutes" in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", [commands, methods, memory, jobs], ids=lambda module: module.__name__)
def test_every_method_is_measured_unasked_or_named_with_the_reason_why_not(benchmark):
    measured, named = set(benchmark.METHODS), benchmark.NOT_MEASURED
    assert measured | set(named) == set(TITLES) and not measured & set(named)
    assert all(named.values()), "say why it is not measured"


def test_every_method_with_a_peer_is_a_method():
    assert set(step_methods.METHODS) <= set(TITLES) and not set(step_methods.METHODS) & set(step_methods.NOT_MEASURED)


def test_the_least_memory_is_the_smallest_row_and_never_rounded_down():
    def row(method, used, pictures="1", forwards="1", model="SD1.5"):
        return dict(model=model, method=method, run_gb=used, pictures=pictures, forwards=forwards)

    rows = [row(method, "9.000", model=model) for method in memory.METHODS for model in memory.MODELS]
    rows += [row("textboost", "3.991"), row("textboost", "4.500", "4", "2"), row("textboost", "")]
    rows += [row("dreambooth", "5.990", "1+1", "2")]
    table = memory.least_table(rows).splitlines()
    assert next(line for line in table if "TextBoost" in line).startswith("| TextBoost | fits in 4.00 GB (batch 1) |")
    assert any("| DreamBooth | fits in 5.99 GB (batch 1+1 x 2) |" in line for line in table)


def test_numbers_are_those_of_the_results():
    readme = plot.README.read_text()
    assert plot.with_numbers(readme) == readme, "run: python benchmarks/plot.py"
    assert (ROOT / "docs" / "speed.md").read_text() == plot.speed_docs.page(), "run: python benchmarks/plot.py"


def test_every_function_it_names_exists():
    import pcs_kernels
    import pcs_kernels.diagnostics

    for name in set(re.findall(r"pcs_kernels\.([a-zA-Z_.0-9]+)\(", (ROOT / "pcs_kernels" / "README.md").read_text())):
        found = pcs_kernels
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found), name


@pytest.mark.slow
def test_benchmarks_run_to_the_end(tmp_path):
    """One op, few rounds: the gate, the timing, the targets and the results file."""
    out = tmp_path / "ops.csv"
    command = [sys.executable, "benchmarks/run.py", "--op", "geglu", "--rounds", "3", "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert ran.returncode == 0, ran.stderr
    lines = out.read_text().splitlines()
    assert len(lines) == 1 + 12 and "ratio" in lines[0]


def test_the_roofline_is_of_what_is_counted_and_every_slower_kernel_has_a_reason():
    assert roofline.page() == roofline.SAVED.read_text(), "run: python benchmarks/roofline.py --save"
