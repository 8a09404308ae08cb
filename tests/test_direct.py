"""The short way of a call that was made before, past torch's dispatcher: whoever watches still sees it."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pcs_kernels
from pcs_kernels import _direct, costs

R = torch.randn


def remembered(call, *args) -> None:
    """Make a call often enough that it goes the short way."""
    for _ in range(3):
        call(*args)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Labelled(Tensor):
    """A subclass that counts what it meets."""

    met: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.met.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_call_is_remembered_by_what_it_looks_like_and_the_profiler_sees_it():
    x = R(2, 8)
    remembered(pcs_kernels.geglu, x)
    kind = _direct.kind_of((x, ""))
    assert any(kind in known for known in _direct._choices)
    assert kind == _direct.kind_of((R(2, 8), "")) != _direct.kind_of((R(2, 8).to(torch.bfloat16), ""))
    with torch.profiler.profile() as profile:
        pcs_kernels.geglu(x)
    assert "pcs_kernels::geglu_forward" in {event.name for event in profile.events()}, "the profiler sees the op"


@pytest.mark.parametrize("grad", [False, True])
def test_whoever_watches_still_sees_the_op(grad):
    x = R(2, 8, requires_grad=grad)
    remembered(pcs_kernels.geglu, x)
    with Seen() as seen:
        pcs_kernels.geglu(x).sum()
    assert "pcs_kernels::geglu_forward" in seen.names
    with SeenFunctions() as functions:
        pcs_kernels.geglu(x)
    assert any("geglu_forward" in name for name in functions.names)
    with FakeTensorMode() as mode:
        assert type(pcs_kernels.geglu(mode.from_tensor(x))).__name__ == "FakeTensor"
    graph = make_fx(lambda x: torch.ops.aten.detach(x) * pcs_kernels.geglu(x).sum())(x.detach())
    assert "pcs_kernels.geglu_forward" in graph.code
    pcs_kernels.geglu(x.detach().as_subclass(Labelled))
    assert any("geglu_forward" in name for name in Labelled.met)


def test_the_flop_counter_and_autocast_see_the_op():
    q, k = R(1, 2, 9, 8), R(1, 2, 5, 8)
    remembered(pcs_kernels.cross_attention, q, k, k)
    with FlopCounterMode(display=False, custom_mapping=costs.formulas()) as counter:
        pcs_kernels.cross_attention(q, k, k)
    assert counter.get_total_flops() == 4 * q.numel() * 5
    x, w = R(2, 3, 8), R(8, 8)
    low = (R(2, 8), R(8, 2))
    with pcs_kernels.backend("reference"):
        remembered(pcs_kernels.lowrank_residual, x, w, None, *low)
        expected = pcs_kernels.lowrank_residual(x, w, None, *low)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(pcs_kernels.lowrank_residual(x, w, None, *low), expected)


def test_a_call_of_another_kind_is_checked_again():
    x = R(2, 8, 4, 4)
    remembered(pcs_kernels.group_norm_silu, x, 1)
    with pytest.raises(RuntimeError, match="int"):
        pcs_kernels.group_norm_silu(x, 1.0)  # equal to 1, and no integer
    for _ in range(3):  # of an integer the schema makes a float
        assert torch.isfinite(pcs_kernels.group_norm_silu(x, 1, eps=2**70)).all()
    with pytest.raises(ValueError, match="groups = 3"):
        pcs_kernels.group_norm_silu(x, 3)
    remembered(pcs_kernels.geglu, x)
    with pytest.raises(TypeError, match="dense strided"):
        pcs_kernels.geglu(x.to_sparse())  # it has the strides of a dense tensor
    index = torch.tensor([0, 1])
    stack = R(2, 3, 8), R(2, 8, 3)
    call = (R(2, 5, 8), R(8, 8), None, *stack, None, 1.0)
    remembered(pcs_kernels.lowrank_residual, *call, index)
    with pytest.raises(IndexError, match="index holds 7"):
        pcs_kernels.lowrank_residual(*call, torch.tensor([0, 7]))


def test_a_lazily_negated_tensor_is_read_with_its_sign():
    negated = torch.complex(R(2, 8), R(2, 8)).conj().imag
    assert negated.is_neg()
    for _ in range(3):
        torch.testing.assert_close(pcs_kernels.geglu(negated), pcs_kernels.geglu(negated.resolve_neg()))


def test_choices_that_were_forgotten_are_made_again(monkeypatch):
    from pcs_kernels.ops.geglu.op import OP

    x = R(2, 8)
    remembered(pcs_kernels.geglu, x)
    asked = []
    monkeypatch.setattr(OP, "select", lambda *args: asked.append(args) or OP.module("reference"))
    pcs_kernels.geglu(x)
    assert not asked
    pcs_kernels._direct.forget_choices()
    pcs_kernels.geglu(x)
    assert asked
    pcs_kernels._direct.forget_choices()  # the stand-in's choice
