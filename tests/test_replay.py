"""A call played again launches what its host code launches: the same kernels, grids, numbers and places."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import pcs_kernels
from pcs_kernels import _replay
from pcs_kernels.ops.cross_attention.op import Needs

triton = pytest.importorskip("triton", reason="triton is not installed here; there are no launches")

R = torch.randn
LAST = torch.channels_last


def address(a):
    return a.data_ptr() if isinstance(a, Tensor) else a


class Launches:
    """A driver that keeps what a launcher is given, and runs nothing."""

    def __init__(self):
        from triton.backends.compiler import GPUTarget

        self.kept: list[tuple] = []
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: GPUTarget("cuda", 86, 32)
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (None, name, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 99 * 1024},
        )

    def launcher_cls(self, source, metadata):
        return lambda *launch: self.kept.append(launch)

    def of(self, call) -> tuple[list[tuple], object]:
        """(function, grid and arguments of each launch of a call, with tensors as their addresses; its result)"""
        self.kept = []
        result = call()
        return [(one[4], one[:3], tuple(map(address, one[9:]))) for one in self.kept], result


def without_bias(given):
    return (*given[:2], *given[3:])


def calls():
    """(name, implementation's function, arguments of a kind)"""
    every = Needs(True, True, True)

    def heads(n):
        return R(2, n, 2, 16).transpose(1, 2)

    def picture(layout=LAST):
        return R(2, 32, 6, 5).contiguous(memory_format=layout)

    def maps(capture):
        return None if capture is None else capture.clone()

    def rows(rank, masked):
        return R(2, 20, 32), R(48, 32), R(48), R(rank, 32), R(48, rank), torch.rand(2, 20) if masked else None, 0.5

    yield "geglu", "forward", lambda: (R(3, 5, 64),)
    yield "geglu", "backward", lambda: (R(3, 5, 32), R(3, 5, 64))
    for layout in (LAST, torch.contiguous_format):
        yield "group_norm_silu", "forward", lambda f=layout: (picture(f), 8, R(32), R(32), 1e-5, True)
        norm = pcs_kernels.ops.group_norm_silu.op.Needs(True, True, False)
        yield (
            "group_norm_silu",
            "backward",
            lambda f=layout, n=norm: (picture(f), picture(f), R(2, 8), R(2, 8), 8, R(32), R(32), True, n),
        )
    for capture in (None, torch.rand(2, 5, 7)):
        yield "cross_attention", "forward", lambda c=capture: (heads(9), heads(7), heads(7), maps(c), 0.3)
        yield (
            "cross_attention",
            "backward",
            lambda c=capture: (heads(9), R(2, 5, 9), heads(9), heads(7), heads(7), maps(c), 0.3, every),
        )
    yield "self_attention", "forward", lambda: (heads(9), heads(9), heads(9), 0.3)
    for rank, masked in ((8, False), (32, True)):
        yield "lowrank_residual", "forward", lambda r=rank, m=masked: (*rows(r, m), None)
        low = pcs_kernels.ops.lowrank_residual.op.Needs(True, False, False, True, True, False)
        yield (
            "lowrank_residual",
            "backward",
            lambda r=rank, m=masked, n=low: (R(2, 20, 48), *without_bias(rows(r, m)), None, n),
        )


def same_places(found: list[tuple], expected: list[tuple], results: list[tuple[int, int]]) -> None:
    """The same launches: each new address of one stands for one new address of the other, and numbers are equal."""
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    there = dict(results)
    for (_, _, played), (_, _, ordinary) in zip(found, expected, strict=True):
        for a, b in zip(played, ordinary, strict=True):
            if a != b:
                assert isinstance(a, int) and isinstance(b, int) and a > 1 << 20 < b, "numbers differ"
                assert there.setdefault(b, a) == a, "two places for one buffer"
    assert len(set(there.values())) == len(there), "one place for two buffers"


@pytest.mark.slow
@pytest.mark.parametrize("name, direction, make", list(calls()), ids=lambda part: part if isinstance(part, str) else "")
def test_a_call_played_again_launches_what_its_host_code_launches(name, direction, make):
    from pcs_kernels import _launch
    from tests.ptx.launcher import ops_on

    if _launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1: interpreted kernels are not launched")
    torch.utils.deterministic.fill_uninitialized_memory = False
    driver = Launches()
    with ops_on(86, driver):
        chosen = pcs_kernels._dispatch.OPS[name].module("triton")
        repeated = _replay.Repeated(lambda chosen, *args: getattr(chosen, direction)(*args), chosen)
        for _ in range(_replay.TRIES):
            repeated(*make())
        assert repeated.plan is not None, "it is not played again"
        args = make()
        found, result = driver.of(lambda: repeated(*args))
        assert found and all(type(a) is not Tensor for one in driver.kept for a in one[9:]), "host code ran"
        expected, wanted = driver.of(lambda: getattr(chosen, direction)(*args))
        pairs = list(zip(result, wanted, strict=True)) if isinstance(wanted, tuple) else [(result, wanted)]
        for a, b in pairs:
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
            assert not a.numel() or a.untyped_storage().nbytes() == b.untyped_storage().nbytes()
        same_places(found, expected, [(b.data_ptr(), a.data_ptr()) for a, b in pairs if a.numel()])
        kept = [t.clone() if isinstance(t, Tensor) else t for t in args]
        odd = [R(t.numel() + 1)[1:].view(t.shape) if isinstance(t, Tensor) and t.is_contiguous() else t for t in kept]
        if any(isinstance(t, Tensor) and t.data_ptr() % 16 for t in odd):
            driver.of(lambda: repeated(*odd))
            assert any(isinstance(a, Tensor) for one in driver.kept for a in one[9:]), "an odd address is not played"
