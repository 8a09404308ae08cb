"""Values and every gradient of every op on the native backend and the reference, under the one tolerance rule."""

import pytest
import torch

import pcs_kernels
from tests import needs
from tests.closeness import assert_no_worse_than
from tests.op_cases import all_cases, evaluate

CASES = all_cases()


@needs.native
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_native_is_no_worse_than_torch(case, dtype):
    exact = evaluate(case, "reference", dtype, torch.float64)
    low = evaluate(case, "reference", dtype)
    found = evaluate(case, "native", dtype)
    assert found.keys() == exact.keys()
    for name in exact:
        assert_no_worse_than(found[name], exact[name], low[name], f"{case.name}: {name}")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_reference_gradients_are_those_of_autograd(case):
    """The references' own backwards against finite differences, on a few of the inputs' directions."""
    torch.manual_seed(2)
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    with pcs_kernels.backend("reference"):
        outputs = case.call(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        seeds = [torch.randn_like(y) for y in outputs]
        gradients = torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)
        directions = [torch.randn_like(x) for x in leaves]
        step = 1e-5

        def along(t):
            moved = case.call(*[x.detach() + t * d for x, d in zip(leaves, directions, strict=True)])
            moved = moved if isinstance(moved, tuple) else (moved,)
            return sum(float((y * s).sum()) for y, s in zip(moved, seeds, strict=True))

        slope = (along(step) - along(-step)) / (2 * step)
    predicted = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
    # a central difference in float64: the step's square is 1e-10, and sums of thousands of terms cancel in it
    assert slope == pytest.approx(predicted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("backend", needs.CPU_BACKENDS)
def test_large_mean_does_not_cancel(backend):
    """Moments of values that are all far from zero: the naive mean of squares would lose every digit."""
    x = 1000 + torch.randn(1, 64, 31, 17)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        with pcs_kernels.backend(backend):
            found = pcs_kernels.group_norm_silu(y, 8)
        exact = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 8))
        low = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 8))
        assert_no_worse_than(found, exact, low)


@pytest.mark.parametrize("backend", needs.CPU_BACKENDS)
def test_a_nan_stays_visible(backend):
    for make in (
        lambda x: pcs_kernels.geglu(x),
        lambda x: pcs_kernels.self_attention(*[x.view(1, 1, 8, 16)] * 3),
        lambda x: pcs_kernels.cross_attention(*[x.view(1, 1, 8, 16)] * 3)[0],
        lambda x: pcs_kernels.group_norm_silu(x.view(1, 8, 16), 2),
        lambda x: pcs_kernels.lowrank_residual(x, torch.eye(16), None, torch.ones(1, 16), torch.ones(16, 1)),
    ):
        x = torch.randn(8, 16)
        x[3, 5] = float("nan")
        with pcs_kernels.backend(backend):
            assert make(x).isnan().any()
