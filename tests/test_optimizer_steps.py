"""The rule that a step of the 8-bit optimizer is held against, on the CPU's backends and on wrong steps."""

import pytest
import torch

from pcs_kernels import diagnostics
from tests.optimizer_steps import State, assert_stepped, stepped

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def trial(dtype, n=1100, steps=3):
    """(state before, gradient, state after) of the last of some reference steps."""
    state = State.first(n, dtype, "cpu")
    for step in range(1, steps + 1):
        before, grad = state, torch.randn(n).to(dtype)
        state = stepped(before, grad, step, "reference")
    return before, grad, state


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backends_of_this_machine_keep_it(dtype):
    before, grad, after = trial(dtype)
    assert_stepped(after, after, before, grad, 3)
    if dtype != torch.float16 and diagnostics.native_build().instruction_set:
        assert_stepped(stepped(before, grad, 3, "native"), after, before, grad, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", ("a code", "a scale", "a parameter", "the step", "the rounding"))
def test_a_wrong_step_is_found(dtype, wrong):
    if wrong == "the rounding" and dtype == torch.float32:
        pytest.skip("float32 is not rounded stochastically")
    before, grad, after = trial(dtype)
    found, step = after.copy(), 3
    if wrong == "a code":
        found.codes[0][500] = max(1, int(found.codes[0][500])) - 1
    elif wrong == "a scale":
        found.scales[1][2] *= 1 + 1e-5
    elif wrong == "a parameter":
        found.param[700] += 0.1
    elif wrong == "the step":
        found = stepped(before, grad, 1, "reference")
    else:
        found.param[::10] = torch.nextafter(after.param, torch.full_like(after.param, 9))[::10]  # a unit up
    with pytest.raises(AssertionError):
        assert_stepped(found, after, before, grad, step)
