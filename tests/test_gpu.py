"""Every op's Triton kernels on a real GPU, under the one tolerance rule; skipped where there is none."""

import pytest
import torch

import pcs_kernels
from tests.closeness import assert_no_worse_than
from tests.op_cases import all_cases, evaluate
from tests.optimizer_steps import State, assert_stepped, stepped

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", all_cases(), ids=lambda c: c.name)
def test_triton_is_no_worse_than_torch(case, dtype):
    dtype = DTYPES[dtype]
    exact = evaluate(case, "reference", dtype, torch.float64, "cuda")
    low = evaluate(case, "reference", dtype, device="cuda")
    found = evaluate(case, "triton", dtype, device="cuda")
    for name in exact:
        assert_no_worse_than(found[name], exact[name], low[name], f"{case.name}: {name}")


@pytest.mark.parametrize("case", all_cases()[::3], ids=lambda c: c.name)
def test_triton_repeats_bit_for_bit(case):
    first, second = (evaluate(case, "triton", torch.bfloat16, device="cuda") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", (5000, 256 * 33, 300))
def test_optimizer_steps_are_right_from_the_same_state(n, dtype):
    state = State.first(n, DTYPES[dtype], "cuda")
    for step in range(1, 4):
        grad = torch.randn(n).to(state.param)
        found, reference = (stepped(state, grad, step, backend) for backend in ("triton", "reference"))
        assert_stepped(found, reference, state, grad, step)
        state = reference


def test_self_attention_providers_agree():
    q, k, v = (torch.randn(2, 8, 1024, 40, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with pcs_kernels.backend("reference"):
        low = pcs_kernels.self_attention(q, k, v)
    for backend in ("sdpa", "triton"):
        with pcs_kernels.backend(backend):
            assert_no_worse_than(pcs_kernels.self_attention(q, k, v), exact, low, backend)


def test_a_whole_step_is_captured_in_a_cuda_graph():
    """No op waits for the host: forward, backward and all of it replays from one graph."""
    x = torch.randn(2, 64, 320, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(320, 320, device="cuda", dtype=torch.bfloat16) / 18
    down, up = (torch.randn(s, device="cuda", requires_grad=True) for s in ((16, 320), (320, 16)))

    def step():
        y = pcs_kernels.lowrank_residual(x, weight, None, down, up)
        heads = y.unflatten(-1, (8, 40)).transpose(1, 2)
        out, maps = pcs_kernels.cross_attention(
            heads, heads[:, :, :7], heads[:, :, :7], torch.ones(2, 1, 7, device="cuda")
        )
        loss = out.float().square().mean() + maps.mean()
        return torch.autograd.grad(loss, (x, down, up))

    for _ in range(3):
        expected = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
