"""Packed copies of frozen weights on the CPU: made for the directions that are allowed, and counted so."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from pcs_trainer.memory.counts import Counted, Request
from pcs_trainer.memory.networks import Networks
from pcs_trainer.methods import settings_for
from unet_families import SMALL

import pcs_kernels
from pcs_kernels import _heap, _packed
from tests import needs

KEPT = {"both": 6, "forward": 3, "none": 0}


@needs.native
@pytest.mark.parametrize("directions", list(KEPT))
def test_frozen_weights_are_packed_for_the_allowed_directions_alone(directions):
    torch.manual_seed(0)
    conv, linear, other = torch.randn(16, 16, 3, 3), torch.randn(16, 16), torch.randn(16, 16)
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    x = torch.randn(1, 16, 8, 8, requires_grad=True)
    found = []
    for allowed in ("both", directions):
        pcs_kernels.forget_packed_weights()
        with pcs_kernels.packing(allowed):
            y = pcs_kernels.frozen_conv2d(x, conv).flatten(2).mT
            y = pcs_kernels.frozen_linear(y, linear)
            y = pcs_kernels.lowrank_residual(y, other, None, down, up)
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
        found.append((y.detach(), gradient))
    kinds = [kind for _, _, kinds in _packed._cache.values() for kind in kinds if "adapter" not in kind[0]]
    assert len(kinds) == KEPT[directions]
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()  # other orders of summation in float32
    pcs_kernels.forget_packed_weights()


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="both, forward, none"), pcs_kernels.packing("backward"):
        pass


@pytest.mark.slow
@needs.native
def test_the_planner_counts_the_directions_that_the_settings_allow():
    found = []
    for packing in KEPT:
        settings = settings_for(None, "personalized_residuals", packing=packing)
        counted = Counted(Request(Networks(SMALL, []), settings, (1, 16), torch.bfloat16, "cpu", False))
        found.append(counted.lasting()["packed copies of weights"])
    both, forward, none = found
    assert none == 0 < forward < both <= 2 * forward


FORGOTTEN = """
import re, torch, pcs_kernels
from pcs_kernels import _heap
assert _heap._libc() is not None
def resident():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
weights = [torch.randn(1024, 1024) for _ in range(16)]  # 4 MB each
x = torch.randn(8, 1024, requires_grad=True)
def product():
    pcs_kernels.frozen_linear(x, weights[0]).sum().backward()
    pcs_kernels.forget_packed_weights()
product()
before, kept = resident(), []
for weight in weights:  # as a step does: what stays between the copies is small
    pcs_kernels.frozen_linear(x, weight).sum().backward()
    kept.append(torch.zeros(20_000))
packed = resident() - before
pcs_kernels.forget_packed_weights()
print(packed, resident() - before)
"""


@pytest.mark.slow
@needs.native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_forgotten_copies_leave_the_process():
    done = subprocess.run([sys.executable, "-c", FORGOTTEN], capture_output=True, text=True, check=True)
    packed, left = map(int, done.stdout.split())
    assert packed > 100e6  # 16 weights of 4 MB in two directions
    assert left < packed / 8


def test_two_threads_share_one_threshold(monkeypatch):
    """The first to enter may be the first to leave."""
    set_to = []
    monkeypatch.setattr(_heap, "_set_threshold", set_to.append)
    first, second = _heap.pages_of_their_own(), _heap.pages_of_their_own()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert set_to == [_heap.SMALL, _heap.SMALL, _heap.SMALL, _heap.LARGEST]
