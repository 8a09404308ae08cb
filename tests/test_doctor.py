"""pcs doctor: what runs is what is said, a wrong operation is found, and there is one line to do."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
from pcs_trainer import machine
from pcs_trainer.cli import doctor
from pcs_trainer.report import run_report

import pcs_kernels
from pcs_kernels import _native, diagnostics


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


def test_every_operation_is_there_and_exact(found):
    assert {op.name for op in found.ops} == set(diagnostics.op_names())
    for op in found.ops:
        assert not op.wrong, f"{op.name}: {op.error} of {op.allowed}"
        assert (op.error is None) == (op.backend == "reference")
        assert op.backend not in op.others


def test_the_reasons_are_those_of_the_machine(found):
    if not torch.cuda.is_available():
        assert found.kind == "cpu"
        assert all("CUDA" in op.others["triton"] or "triton package" in op.others["triton"] for op in found.ops)
    assert found.dtype in (torch.bfloat16, torch.float32) and len(found.dtype_reason) > 10
    assert found.versions["torch"] == torch.__version__


def test_the_report_says_it_all(found):
    text = doctor.report(found)
    for op in found.ops:
        assert op.name in text
    assert found.native in text and found.dtype_reason in text and found.device in text
    assert text.endswith(found.advice) and "\n" not in found.advice
    assert max(map(len, found.advice.splitlines())) < 120


def test_a_wrong_kernel_is_named(monkeypatch):
    """A native kernel that is off by a percent is seen, and the advice names it."""
    monkeypatch.setattr(pcs_kernels, "geglu", _off_by_a_percent(pcs_kernels.geglu))
    error, allowed = doctor.op_error("geglu", torch.float32, "cpu")
    assert error > allowed
    state = doctor.OpState("geglu", "native", {}, error, allowed)
    assert state.wrong
    advice = doctor._advice("cpu", True, [state], nvidia=False, triton=None)
    assert advice.startswith("geglu errs") and "PCS_BACKEND=reference" in advice
    assert "WRONG" in doctor.report(dataclasses.replace(doctor.examine(), ops=[state]))


def _off_by_a_percent(op):
    return lambda x: op(x) * (1.0 if diagnostics.forced_backend() == "reference" else 1.01)


@pytest.mark.parametrize("facts, says", [
    (dict(kind="cpu", has_native=True, nvidia=False, triton=None), "All good"),
    (dict(kind="cpu", has_native=False, nvidia=False, triton=None), "C++ compiler"),
    (dict(kind="cpu", has_native=True, nvidia=True, triton=None), "torch with CUDA"),
    (dict(kind="cuda", has_native=True, nvidia=True, triton="there is no C compiler"), "torch: there is no C compiler"),
    (dict(kind="cuda", has_native=False, nvidia=True, triton=None), "All good"),
])  # fmt: skip
def test_one_line_to_do(facts, says, monkeypatch):
    monkeypatch.delenv("PCS_BACKEND", raising=False)
    assert says in doctor._advice(ops=[], **facts)


def test_a_forced_backend_is_said(monkeypatch):
    monkeypatch.setenv("PCS_BACKEND", "reference")
    assert "unset it" in doctor._advice("cpu", True, [], nvidia=False, triton=None)


def test_without_the_native_build_the_reference_runs(monkeypatch):
    def none():
        raise ImportError("the C++ kernels were not built (no compiler at install time)")

    monkeypatch.setattr(_native, "library", none)
    assert machine.native_build() == ("the C++ kernels were not built (no compiler at install time)", False)
    if not torch.cuda.is_available():
        assert machine.kernels()[1] and "not built" in machine.slow_note() and "slower" in machine.slow_note()


@pytest.mark.slow
def test_a_run_on_the_reference_says_so(tmp_path, capsys, monkeypatch):
    from pcs_trainer.cli import entry as cli

    photos = str(Path(__file__).parents[1] / "examples" / "photos")
    words = ["train", photos, "--class", "mug", "--steps", "1", "--no-report", "--out"]
    assert cli.main([*words, str(tmp_path / "kernels")]) == 0
    assert ("slower than it could" in capsys.readouterr().err) == bool(machine.slow_note())
    with pcs_kernels.backend("reference"):
        assert cli.main([*words, str(tmp_path / "plain")]) == 0
        assert cli.main(["plan", "--device", "cpu", "--method", "personalized_residuals"]) == 0
        assert machine.kernels()[0] in run_report.machine()["kernels"]
    said = capsys.readouterr().err
    assert "slower than it could: the operations run on the reference backend" in said and "plain PyTorch" in said


# (compute capability, its name, what it trains in)
GPUS = [
    ((6, 1), "NVIDIA GeForce GTX 1080", torch.float32),
    ((7, 0), "Tesla V100-SXM2-16GB", torch.float16),
    ((7, 5), "Tesla T4", torch.float16),
    ((7, 5), "NVIDIA GeForce GTX 1660 SUPER", torch.float32),  # computes NaN in float16
    ((8, 0), "NVIDIA A100-SXM4-40GB", torch.bfloat16),
]


@pytest.mark.parametrize("capability, name, dtype", GPUS)
def test_the_precision_of_a_gpu_is_the_same_for_every_command(capability, name, dtype, monkeypatch):
    from pcs_trainer.cli.commands.common import dtype_of

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen, reason = machine.training_dtype("cuda")
    assert chosen is dtype and (f"{capability[0]}.{capability[1]}" in reason or "GTX 16" in reason)
    for model in (None, "some/model"):  # as train and plan ask
        assert dtype_of(argparse.Namespace(dtype=None, model=model), "cuda") == (chosen, reason)
    assert dtype_of(argparse.Namespace(dtype="float32", model=None), "cuda") == (torch.float32, "")


def test_the_precision_to_plan_for_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.planning_dtype("cuda")[0] is torch.bfloat16
    assert machine.planning_dtype("cpu") == machine.training_dtype("cpu")
