"""What the README claims is what the results files say, and its code runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_numbers_are_those_of_the_results():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import plot

    readme = plot.README.read_text()
    assert plot.with_numbers(readme) == readme, "run: python benchmarks/plot.py"
    assert (ROOT / "docs" / "speed.md").read_text() == plot.speed_docs.page(), "run: python benchmarks/plot.py"


def test_every_function_it_names_exists():
    import pcs_kernels

    for name in set(re.findall(r"pcs_kernels\.([a-zA-Z_.0-9]+)\(", (ROOT / "README.md").read_text())):
        found = pcs_kernels
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found), name


def test_benchmarks_run_to_the_end(tmp_path):
    """One op, few rounds: the gate, the timing, the targets and the results file."""
    out = tmp_path / "ops.csv"
    command = [sys.executable, "benchmarks/run.py", "--op", "geglu", "--rounds", "3", "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert ran.returncode == 0, ran.stderr
    lines = out.read_text().splitlines()
    assert len(lines) == 1 + 12 and "ratio" in lines[0]


def test_the_gpu_script_runs_to_the_end(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    written = {
        "gpu_tests.txt",
        "gpu_rates.json",
        "ops_cuda.csv",
        "gpu_methods.json",
        "gpu_concept.json",
        "gpu_lag.json",
    }
    assert written <= {p.name for p in tmp_path.iterdir()}
