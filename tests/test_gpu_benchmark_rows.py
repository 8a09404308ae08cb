"""What the rows of python -m benchmarks.gpu are: tests by pytest, kernels beside their models, ops and methods."""

import os
import re
from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.gpu import graphs, kernel_tests, kernels, methods, ops, rehearsed
from tests.op_cases import all_cases
from tests.test_gpu_benchmark import machine

ROOT = Path(__file__).parents[1]


def pytest_of(tmp_path, text, seconds=60.0, name="bf16"):
    path = tmp_path / "test_few.py"
    path.write_text(text)
    words = [str(path), "-p", "no:randomly", f"--rootdir={tmp_path}", "-c", os.devnull]
    return kernel_tests.run_pytest(words, name, machine(tmp_path, seconds))


def test_failed_tests_are_named_and_the_report_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_tests, "_workers", list)
    with pytest.raises(RuntimeError, match=r"pytest ended with 1: 1 passed, 1 failed, 0 skipped; .*test_b"):
        pytest_of(tmp_path, "def test_a(): pass\ndef test_b(): assert 1 == 2\n")
    assert (tmp_path / "tests-bf16.xml").is_file() and "1 failed" in (tmp_path / "tests.txt").read_text()


@pytest.mark.slow
def test_tests_that_run_out_of_time_keep_what_ran(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_tests, "_workers", list)
    script = "import time\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): time.sleep(600)\n"
    with pytest.raises(RuntimeError, match=r"out of time: 1 passed, 1 failed, 0 skipped; .*test_b"):
        pytest_of(tmp_path, script, seconds=kernel_tests.STOP_BEFORE + 10)


def test_tests_are_read_from_what_was_printed_where_pytest_was_killed(tmp_path):
    printed = """
tests/test_gpu.py::test_a[geglu (7, 682)-bf16] PASSED   [ 10%]
tests/test_gpu.py::test_b[lowrank 1x2->3 r1 conv-bf16] FAILED   [ 20%]
[gw1] [ 30%] PASSED tests/test_gpu.py::test_c[conv k3 s1-bf16]
[gw0] [ 40%] FAILED tests/test_gpu.py::test_d[linear-bf16]
tests/test_gpu.py::test_e SKIPPED (no GPU)   [ 50%]
"""
    found = kernel_tests.figures(tmp_path / "none.xml", printed)
    assert found["said"] == "2 passed, 2 failed, 1 skipped"
    assert found["failed"] == [
        "tests/test_gpu.py::test_b[lowrank 1x2->3 r1 conv-bf16]",
        "tests/test_gpu.py::test_d[linear-bf16]",
    ]


def test_every_gpu_test_is_in_one_row():
    names = [f"{case.name}-{dtype}" for case in all_cases() for dtype in ("fp32", "fp16", "bf16")]
    names += [f"{case.name}" for case in all_cases()]  # the tests without a dtype, which have bfloat16's own

    def chosen(words, name):
        return bool(eval(re.sub(r"(?!and\b|or\b|not\b)\b\w+", lambda m: str(m[0] in name), words)))

    words = [k for path, k in kernel_tests.CALLS.values() if path == kernel_tests.KERNELS]
    assert all(sum(chosen(k, name) for k in words) == 1 for name in names)


@pytest.mark.parametrize("op", kernels.OPS)
def test_every_modelled_kernel_has_a_call_that_is_measured(op):
    """Names and labels of counted.json are those of the calls; the times are invented here."""
    labels = {label for label, _ in kernels.calls(op, 86, "meta")}
    wanted = [kernel["name"].partition(" ") for kernel in kernels.counted(op, 86)]
    assert {label for _, _, label in wanted} <= labels
    found = {label: [(name, 10.0) for name, _, l in wanted if l == label] for label in labels}
    lines = kernels.beside(op, 86, found, "NVIDIA GeForce RTX 3060", 3e11)
    assert len(lines) == len(wanted) and all(line["of_modelled"] > 0 for line in lines)
    first = kernels.counted(op, 87)[0]
    times = roofline.times(first, next(card for card in roofline.CARDS if card.architecture == 86))
    assert max(lines[0]["modelled_us"].values()) == times.modelled
    assert set(kernels.modelled(first, "NVIDIA H200", 3e12)) == {"memory"}
    with pytest.raises(RuntimeError, match="did not run at"):
        kernels.beside(op, 90, {}, "NVIDIA H100", 3e12)


def test_ops_are_named_without_making_their_tensors():
    names = [row.name for row in ops.rows(False)]
    assert len(names) == len(set(names)) > 40
    assert names[0].endswith("bfloat16") and any("860 M" in name for name in names)


def test_a_graphed_dreambooth_is_called_another_way():
    names = [row.name for row in methods.rows(False)]
    assert "dreambooth, batch 1, graph, optimizer after the backward" in names
    with pytest.raises(ValueError, match="in_backward=False"):
        rehearsed.graphed_step(rehearsed.rehearsed(machine(Path()), "small", "dreambooth", 1))


def test_one_place_records_graphs():
    places = [path for path in (ROOT / "benchmarks").rglob("*.py") if "CUDAGraph(" in path.read_text()]
    assert places == [Path(graphs.__file__)]
