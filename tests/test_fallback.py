"""A backend that cannot be loaded, build or launch: the next one runs, one warning says so, and a forced one raises."""

from __future__ import annotations

import subprocess
import sys
import types
import warnings

import pytest
import torch

import pcs_kernels
from pcs_kernels import _dispatch, _fallback
from pcs_kernels._dispatch import BackendUnavailable, Op
from pcs_kernels._fallback import Fault


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(_fallback, "_told", set())


class OutOfResources(Exception):
    """As Triton's, of the same name and attributes."""

    required, limit, name = 120832, 101376, "shared memory"


class PTXASError(Exception):
    pass


def double(x):
    return 2 * x


def add_one(x, step=0):
    x += 1


def an_op(monkeypatch, implementation, name="fake_op") -> Op:
    """An op of a package in memory: `implementation` is its Triton module, and the reference doubles its argument."""
    package = f"tests_{name}"
    reference = types.ModuleType(f"{package}.reference")
    for function in (double, add_one):
        copy = types.FunctionType(function.__code__, {}, function.__name__, function.__defaults__)
        copy.__module__ = reference.__name__
        setattr(reference, function.__name__, copy)
    modules = {package: types.ModuleType(package), f"{package}.reference": reference}
    if implementation is not None:
        modules[f"{package}.triton_impl"] = implementation
    for key, module in modules.items():
        monkeypatch.setitem(sys.modules, key, module)
    monkeypatch.setattr(_dispatch, "OPS", dict(_dispatch.OPS))
    return Op(name, package, order={"cpu": ("triton", "reference")})


def triton_loads_by(load, monkeypatch) -> None:
    """The import of a Triton implementation is this function."""
    whole = _dispatch.importlib.import_module

    def import_module(name):
        return load(name) if name.endswith("triton_impl") else whole(name)

    monkeypatch.setattr(_dispatch.importlib, "import_module", import_module)


def triton_module(**functions) -> types.ModuleType:
    module = types.ModuleType("triton_impl")
    module.reason = lambda *args: None
    module.__dict__.update(functions)
    return module


def test_any_error_of_an_import_is_a_reason(monkeypatch):
    """An old Triton raises AttributeError where `triton.knobs` is asked for, a broken one anything."""
    op = an_op(monkeypatch, None)

    def broken(name):
        raise AttributeError("module 'triton' has no attribute 'knobs'\nand a second line")

    triton_loads_by(broken, monkeypatch)
    with pytest.warns(
        RuntimeWarning, match=r"triton backend fails.*plain torch runs instead.*'knobs'.*Fix: pip"
    ) as told:
        assert op.select("", "cpu").double(3) == 6
        assert op.select("", "cpu").double(4) == 8
    assert len(told) == 1, "said once"
    assert "second line" not in str(told[0].message)
    with pytest.raises(BackendUnavailable, match=r"fake_op.*'knobs'.*Fix: pip"):
        op.select("triton", "cpu")
    assert "'knobs'" in op.why_not("triton")


def test_a_package_that_is_not_there_is_no_fault(monkeypatch):
    """Nothing is broken where triton or a compiler was never installed: the trainer says it, and no warning does."""
    op = an_op(monkeypatch, None)

    def absent(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    triton_loads_by(absent, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op.select("", "cpu").double(3) == 6
    assert op.why_not("triton") == _dispatch.NEEDS["triton"]


def test_an_old_triton_leaves_a_package_that_works():
    """In a process of its own, with a `triton` that has nothing in it."""
    code = (
        "import sys, types, warnings; warnings.simplefilter('error');"
        "t = sys.modules['triton'] = types.ModuleType('triton'); t.__version__ = '3.1.0';"
        "import torch, pcs_kernels; from pcs_kernels import diagnostics;"
        "pcs_kernels.geglu(torch.randn(2, 8));"
        "print(diagnostics.table())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if line.split()[1:2] == ["triton"]]
    assert len(lines) == 8 and all("off: triton 3.1.0 cannot be loaded" in line for line in lines), ran.stdout


@pytest.mark.parametrize(
    "error, says",
    [
        (OutOfResources("out of resource"), r"needs 120832 of shared memory and the card allows 101376"),
        (PTXASError("`ptxas` failed with error code 255"), "could not build it"),
        (
            RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device"),
            "no kernel image",
        ),
        (RuntimeError("PassManager::run failed"), "could not build it"),
    ],
)
def test_a_launch_that_fails_is_done_by_the_reference_and_not_tried_again(error, says, monkeypatch):
    tried = []

    def run(x):
        tried.append(tuple(x.shape))
        if x.shape[0] == 3:
            raise error
        return x + x

    op = an_op(monkeypatch, triton_module(double=run))
    big, small = torch.ones(3, 2), torch.ones(2, 2)
    with pytest.warns(RuntimeWarning, match=rf"fake_op \(double\) of float32 \[3, 2\].*{says}.*plain torch") as told:
        for x in (big, big, small, big, small):
            assert torch.equal(op.select("", "cpu", x).double(x), 2 * x)
    assert tried == [(3, 2), (2, 2), (2, 2)], "the failing shape is tried once, the other each time"
    assert len(told) == 1
    with pytest.raises(BackendUnavailable, match=rf"fake_op.*{says}.*Fix"):
        op.select("triton", "cpu", big).double(big)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
        ValueError("dout must be [B, H, N, D]"),
    ],
)
def test_another_error_is_not_hidden(error, monkeypatch):
    def run(x):
        raise error

    op = an_op(monkeypatch, triton_module(double=run))
    with pytest.raises(type(error)):
        op.select("", "cpu").double(torch.ones(1))


def test_a_call_in_place_is_done_once(monkeypatch):
    """Its kernel fails before it writes; the number of the step is no part of what is remembered."""

    def run(x, step=0):
        raise OutOfResources

    op = an_op(monkeypatch, triton_module(add_one=run))
    x = torch.zeros(4)
    with pytest.warns(RuntimeWarning) as told:
        for step in range(3):
            op.select("", "cpu", x).add_one(x, step)
    assert torch.equal(x, torch.full((4,), 3.0)) and len(told) == 1


def test_every_call_in_place_launches_one_kernel():
    """So a launch that failed has written nothing, and the reference may do the whole step."""
    pytest.importorskip("triton", reason="triton is not installed here")
    from pcs_kernels._launch import meta, record
    from pcs_kernels.ops.adamw8bit import reference, triton_impl

    p, codes, state, scale = meta(5000), meta(5000).to(torch.uint8), meta(5000).float(), meta(20).float()
    row = meta(12, dtype=torch.float32)
    calls = {
        "step_8bit": lambda: triton_impl.step_8bit(
            p, p, codes, codes, scale, scale, scale, scale, row, None, 256, True
        ),
        "step_32bit": lambda: triton_impl.step_32bit(p, p, state, state, row, None, True),
    }
    in_place = {name for name in vars(triton_impl) if name.startswith("step_") and hasattr(reference, name)}
    assert set(calls) == in_place
    for name, call in calls.items():
        assert len(record(86, name, call)) == 1, name


def test_the_real_ops_are_guarded_in_every_call():
    pytest.importorskip("triton", reason="triton is not installed here")
    conv = {f"{direction}_{kind}" for direction in ("forward", "backward") for kind in ("conv", "linear")}
    calls = {"forward", "backward", "step_8bit", "step_32bit"} | conv
    seen = set()
    for op in _dispatch.OPS.values():
        module = op.module("triton")
        for name in calls & set(vars(module)):
            seen.add(name)
            assert hasattr(getattr(module, name), "__wrapped__"), f"{op.name}.{name}"
            assert getattr(op._strict["triton"], name) is not getattr(module, name)
    assert seen == calls


def test_a_real_op_falls_back_whole(monkeypatch):
    """The second of group_norm_silu's launches fails: the reference does all of it, forward and backward."""
    pytest.importorskip("triton", reason="triton is not installed here")
    op = pcs_kernels.group_norm_silu.__globals__["OP"]
    op.module("triton")
    implementation = sys.modules["pcs_kernels.ops.group_norm_silu.triton_impl"]
    launched = []

    def launch(kernel, grid, *args, **settings):
        launched.append(kernel)
        if len(launched) % 2 == 0:
            raise OutOfResources

    monkeypatch.setattr(implementation, "launch", launch)
    monkeypatch.setattr(implementation, "unavailable", lambda x, dots: None)
    monkeypatch.setitem(op.order, "cpu", ("triton", "reference"))
    x = torch.randn(1, 8, 128, 160, requires_grad=True)  # groups too large for one launch
    y = torch.randn(1, 8, 128, 160)
    with pytest.warns(RuntimeWarning, match="group_norm_silu"):
        out = pcs_kernels.group_norm_silu(x, 4)
        out.backward(y)
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x.grad, torch.autograd.grad(expected, x, y)[0])
    assert len(launched) == 4, "two launches of the forward, two of the backward"


def test_attention_whose_kernel_fails_never_holds_all_scores(monkeypatch):
    """At SD1.5's 512 pixels they take 0.5 GB an image in float32, on a card that was short already."""
    pytest.importorskip("triton", reason="triton is not installed here")
    from pcs_kernels.ops.self_attention import in_parts, reference

    op = pcs_kernels.self_attention.__globals__["OP"]
    op.module("triton")
    implementation = sys.modules["pcs_kernels.ops.self_attention.triton_impl"]

    def no_room(*_, **__):
        raise OutOfResources

    taken = []

    def watched(run):
        return lambda *args: taken.append(args[0].shape[2]) or run(*args)

    monkeypatch.setattr(implementation, "launch", no_room)
    monkeypatch.setattr(implementation, "unavailable", lambda x, dots: None)
    monkeypatch.setattr(implementation, "current_arch", lambda device: 86)
    monkeypatch.setitem(op.order, "cpu", ("triton",))
    monkeypatch.setattr(in_parts, "MOST_SCORES", 2 * 3 * 20 * 8)
    for name in ("forward", "backward"):
        monkeypatch.setattr(reference, name, watched(getattr(reference, name)))
    q, k, v, dout = (torch.randn(2, 3, n, 16, dtype=torch.float64) for n in (50, 20, 20, 50))
    operands = [t.requires_grad_() for t in (q, k, v)]
    with pytest.warns(RuntimeWarning, match="self_attention"):
        out = pcs_kernels.self_attention(*operands)
        gradients = torch.autograd.grad(out, operands, dout)
    assert max(taken) == 8 and sum(taken) == 2 * 50, "8 queries at once, each once in either direction"
    expected = torch.nn.functional.scaled_dot_product_attention(*operands)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, operands, dout))


def test_a_fault_is_a_plain_sentence():
    assert Fault("x") == "x" and isinstance(Fault("x"), str)


def test_tensors_that_cannot_be_stepped_in_one_launch_are_stepped_one_by_one(monkeypatch):
    """A card without room for the kernel of all tensors: the next steps do not try again, and a forced one raises."""
    pytest.importorskip("triton")
    from pcs_kernels.ops.adamw8bit import many
    from pcs_kernels.optim import together

    def no_room(*_):
        raise OutOfResources

    monkeypatch.setattr(many.Many, "step", no_room)
    value, grad, state = torch.zeros(8), torch.ones(8), {"state1": torch.zeros(8), "state2": torch.zeros(8)}
    kind, numbers, launches = (value.device, value.dtype, grad.dtype, False), types.SimpleNamespace(floats=None), {}

    def collected():
        one = together.Together(256, False, launches)
        entry = many.Entry(value, grad, (state["state1"], state["state2"]), 3)
        one._entries[kind] = numbers, [entry], [(value, grad, state)]
        return one

    with pytest.warns(RuntimeWarning, match=r"each tensor by itself: it needs 120832 of shared memory"):
        ((found, same, row),) = collected().step()
    assert found[0] is value and same is numbers and row == 3 and launches == {kind: None}
    monkeypatch.setattr(together, "forced_backend", lambda: "triton")
    launches.clear()
    with pytest.raises(OutOfResources):
        collected().step()
