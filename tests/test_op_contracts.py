"""What every op promises beside its values: registration, compilation, exact gradients, and what it keeps."""

import pytest
import torch

import pcs_kernels
from tests import needs
from tests.closeness import assert_no_worse_than
from tests.op_cases import all_cases, evaluate

R = torch.randn
OPS = torch.ops.pcs_kernels


def raw_calls():
    """Each registered op with arguments that take no gradient (the gradient lives in the functions around them)."""
    q, k, v, capture = R(2, 2, 9, 8), R(2, 2, 5, 8), R(2, 2, 5, 8), torch.rand(2, 1, 5)
    out, lse = OPS.self_attention_forward(q, k, v, 0.3, "")
    x, w, d, u, m = R(2, 5, 8), R(6, 8), R(3, 8), R(6, 3), torch.rand(2, 5)
    picture, gain, shift = R(2, 8, 4, 3), R(8), R(8)
    _, mean, rstd = OPS.group_norm_silu_forward(picture, 2, gain, shift, 1e-5, True, "")
    conv, linear = R(4, 8, 3, 3), R(4, 8)
    yes, no = (True,) * 6, (False, True, False, True, False, True)
    yield "geglu_forward", (x, "")
    yield "geglu_backward", (R(2, 5, 4), x, "")
    yield (
        "group_norm_silu_forward",
        (picture.contiguous(memory_format=torch.channels_last), 2, gain, None, 1e-5, False, ""),
    )
    yield "group_norm_silu_backward", (R(2, 8, 4, 3), picture, mean, rstd, 2, gain, shift, True, True, True, False, "")
    yield "cross_attention_forward", (q, k, v, capture, 0.3, "")
    yield "cross_attention_forward", (q, k, v, None, 0.3, "")
    yield "cross_attention_backward", (R(2, 2, 9, 8), R(2, 1, 9), q, k, v, capture, 0.3, True, False, True, "")
    yield "cross_attention_backward", (None, R(2, 1, 9), q, k, v, capture, 0.3, True, True, True, "")
    yield "self_attention_forward", (q, k, v, 0.3, "")
    yield "self_attention_backward", (R(2, 2, 9, 8), q, k, v, out, lse, 0.3, "")
    yield "lowrank_residual_forward", (x, w, R(6), d, u, m, 0.5, None, True, "")
    yield "lowrank_residual_forward", (x, w, None, R(4, 3, 8), R(4, 6, 3), None, 0.5, torch.tensor([3, 0]), True, "")
    yield "lowrank_residual_backward", (R(2, 5, 6), x, w, d, u, m, 0.5, None, *yes, True, "")
    yield "lowrank_residual_backward", (R(2, 5, 6), x, w, d, u, m, 0.5, None, *no, True, "")
    yield "frozen_conv2d_forward", (picture, conv, None, 1, 1, True, "")
    yield "frozen_conv2d_backward", (R(2, 4, 2, 2), conv, 4, 3, 2, 1, True, "")
    yield "frozen_linear_forward", (x, linear, R(4), True, "")
    yield "frozen_linear_backward", (R(2, 5, 4), linear, True, "")
    p, g = R(300), R(300)
    codes, scales = (lambda: torch.full((300,), 127, dtype=torch.uint8)), (lambda: torch.ones(2))
    maps = [pcs_kernels.ops.adamw8bit.codes.code_map(signed) for signed in (True, False)]
    numbers = pcs_kernels.ops.adamw8bit.row.host_row(1e-3, 0.9, 0.999, 1e-8, 1e-2, 1, 1.0, 7, True)
    yes, no = torch.tensor(True), torch.tensor([False])
    for row, finite in ((numbers, None), (numbers.clone(), yes), (numbers.clone(), no)):
        coded = codes(), codes(), scales(), scales(), *maps
        yield "adamw8bit_step", (p, g, *coded, row, finite, 256, True, "")
        yield "adamw32bit_step", (R(30), R(30), R(30), torch.rand(30), row.clone(), finite, False, "")


@pytest.mark.slow
@pytest.mark.parametrize("backend", needs.CPU_BACKENDS)
def test_opcheck(backend):
    torch.utils.deterministic.fill_uninitialized_memory = False  # opcheck compares two runs bit for bit
    for name, arguments in raw_calls():
        arguments = (*arguments[:-1], backend)
        torch.library.opcheck(getattr(OPS, name).default, arguments)


COMPILED = {
    "geglu": (pcs_kernels.geglu, lambda: [R(3, 64)]),
    "group_norm_silu": (lambda x, w: pcs_kernels.group_norm_silu(x, 4, w), lambda: [R(1, 8, 5, 4), R(8)]),
    "cross_attention": (
        lambda q, k, v: sum(t.sum() for t in pcs_kernels.cross_attention(q, k, v, torch.ones(1, 2, 7))),
        lambda: [R(1, 2, 9, 8), R(1, 2, 7, 8), R(1, 2, 7, 8)],
    ),
    "self_attention": (pcs_kernels.self_attention, lambda: [R(1, 2, 9, 8) for _ in range(3)]),
    "lowrank_residual": (
        lambda x, w, d, u, m: pcs_kernels.lowrank_residual(x, w, None, d, u, m),
        lambda: [R(2, 5, 8), R(6, 8), R(3, 8), R(6, 3), torch.rand(2, 5)],
    ),
    "frozen_conv2d": (lambda x: pcs_kernels.frozen_conv2d(x, torch.ones(4, 8, 3, 3)), lambda: [R(1, 8, 5, 5)]),
    "frozen_linear": (lambda x: pcs_kernels.frozen_linear(x, torch.ones(4, 8)), lambda: [R(3, 8)]),
}


@pytest.mark.slow
@needs.compiler
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole_and_gives_the_same(name):
    call, make = COMPILED[name]
    eager, compiled = make(), None
    eager = [x.requires_grad_() for x in eager]
    compiled = [x.detach().clone().requires_grad_() for x in eager]
    torch._dynamo.reset()
    expected = call(*eager).sum()
    found = torch.compile(call, fullgraph=True)(*compiled).sum()
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_gradcheck_of_references():
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    capture = torch.rand(2, 2, 3, dtype=torch.float64)
    frozen = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    index = torch.tensor([2, 0])
    masked = [leaf(2, 3, 4), leaf(5, 4), leaf(5), leaf(2, 4), leaf(5, 2), leaf(2, 3)]
    stacked = [leaf(2, 3, 4), leaf(5, 4), leaf(5), leaf(3, 2, 4), leaf(3, 5, 2), leaf(2, 3)]
    attention = [leaf(2, 2, 5, 4), leaf(2, 2, 3, 4), leaf(2, 2, 3, 4)]
    with pcs_kernels.backend("reference"):
        check = torch.autograd.gradcheck
        assert check(pcs_kernels.geglu, [leaf(3, 8)])
        assert check(lambda x, w, b: pcs_kernels.group_norm_silu(x, 3, w, b), [leaf(2, 6, 3, 2), leaf(6), leaf(6)])
        assert check(lambda *t: pcs_kernels.cross_attention(*t, capture=capture), attention)
        assert check(pcs_kernels.self_attention, attention)
        assert check(lambda *t: pcs_kernels.lowrank_residual(*t, scale=0.7), masked)
        assert check(lambda *t: pcs_kernels.lowrank_residual(*t, index=index), stacked)
        for stride in (1, 2):
            assert check(lambda x, s=stride: pcs_kernels.frozen_conv2d(x, frozen, stride=s), [leaf(2, 3, 5, 4)])
        assert check(lambda x: pcs_kernels.frozen_linear(x, frozen[0, :, :, 0]), [leaf(3, 3)])


def kept_bytes(call, *inputs) -> dict[int, int]:
    """Bytes of each distinct storage that the backward keeps, parameters (named by the caller) left out."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(*inputs)
    return kept


def test_kept_for_backward():
    torch.utils.deterministic.fill_uninitialized_memory = False
    picture = R(2, 32, 16, 16, requires_grad=True)
    gain, shift = R(32, requires_grad=True), R(32, requires_grad=True)
    weights = [gain, shift, R(8, 32, 3, 3), R(8, 32)]
    parameters = {w.untyped_storage().data_ptr() for w in weights}

    def kept(call, *inputs):
        return sum(n for pointer, n in kept_bytes(call, *inputs).items() if pointer not in parameters)

    assert kept(lambda x: pcs_kernels.frozen_conv2d(x, weights[2]), picture) == 0
    assert kept(lambda x: pcs_kernels.frozen_linear(x, weights[3]), R(4, 32, requires_grad=True)) == 0
    statistics = 2 * (2 * 8 * 4)
    assert kept(lambda x: pcs_kernels.group_norm_silu(x, 8, gain, shift), picture) == picture.nbytes + statistics
    x = R(64, 256, requires_grad=True)
    assert kept(pcs_kernels.geglu, x) == x.nbytes
    q, k, v = (R(2, 4, n, 40, requires_grad=True) for n in (4096, 77, 77))
    capture = torch.rand(2, 1, 77)
    operands = q.nbytes + k.nbytes + v.nbytes
    assert kept(lambda *t: pcs_kernels.cross_attention(*t), q, k, v) == operands
    assert kept(lambda *t: pcs_kernels.cross_attention(*t, capture=capture), q, k, v) == operands + capture.nbytes
    down, up = R(4, 32), R(8, 4)
    parameters |= {t.untyped_storage().data_ptr() for t in (down, up)}
    rows = R(5, 32, requires_grad=True)

    def frozen(x):
        return pcs_kernels.lowrank_residual(x, weights[3], None, down, up)

    assert kept(frozen, rows) == 0
    down.requires_grad_()
    assert kept(frozen, rows) == rows.nbytes


def test_nothing_is_computed_for_what_needs_no_gradient():
    q, k, v = (R(1, 2, 5, 8) for _ in range(3))
    empty = OPS.cross_attention_backward(R(1, 2, 5, 8), None, q, k, v, None, 0.3, True, False, False, "")
    assert [t.numel() > 0 for t in empty] == [True, False, False]
    x = R(1, 8, 4, 4)
    _, mean, rstd = OPS.group_norm_silu_forward(x, 2, R(8), R(8), 1e-5, True, "")
    parts = OPS.group_norm_silu_backward(R(1, 8, 4, 4), x, mean, rstd, 2, R(8), R(8), True, False, True, False, "")
    assert [t.numel() > 0 for t in parts] == [False, True, False]


def test_gradients_flow_through_maps_alone():
    q, k, v = (R(1, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (6, 5, 5))
    capture = torch.rand(1, 2, 5, dtype=torch.float64)
    with pcs_kernels.backend("reference"):
        maps = pcs_kernels.cross_attention(q, k, v, capture)[1]
    expected = capture @ torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1).mean(1).transpose(-1, -2)
    seed = torch.randn_like(maps)
    for a, b in zip(torch.autograd.grad(maps, (q, k), seed), torch.autograd.grad(expected, (q, k), seed), strict=True):
        torch.testing.assert_close(a, b)


@needs.native
def test_forward_and_backward_stay_on_one_backend(monkeypatch):
    x = R(4, 64, requires_grad=True)
    with pcs_kernels.backend("reference"):
        y = pcs_kernels.geglu(x)
    native = pcs_kernels.geglu.__globals__["OP"].module("native")
    monkeypatch.setattr(native, "backward", lambda *a: pytest.fail("the backward left the reference"))
    y.sum().backward()


@pytest.mark.parametrize("backend", needs.CPU_BACKENDS)
@pytest.mark.parametrize("case", all_cases(), ids=lambda c: c.name)
def test_autocast_changes_nothing(case, backend):
    """An op computes in its inputs' dtype, whatever autocast makes of torch's own products."""
    expected = evaluate(case, backend, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(case, backend, torch.float32)
    for name in expected:
        assert found[name].dtype == expected[name].dtype, f"{case.name}: {name}"
        torch.testing.assert_close(found[name], expected[name], msg=lambda m: f"{case.name}: {name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", (False, pytest.param(True, marks=needs.compiler)))
def test_autocast_changes_no_external_backend(compiled):
    q = R(1, 2, 9, 8)
    attention = torch.compile(pcs_kernels.self_attention, fullgraph=True) if compiled else pcs_kernels.self_attention
    with pcs_kernels.backend("sdpa"):
        expected = pcs_kernels.self_attention(q, q, q)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(attention(q, q, q), expected)


@pytest.mark.slow
@needs.native
@pytest.mark.parametrize("threads", (1, 2, 3, 5))
def test_threads_agree_bit_for_bit(threads):
    torch.utils.deterministic.fill_uninitialized_memory = False
    before = torch.get_num_threads()
    own = [c for c in all_cases() if not c.name.startswith(("conv", "linear", "lowrank"))]
    try:
        torch.set_num_threads(before)
        expected = [evaluate(case, "native", torch.bfloat16) for case in own]
        torch.set_num_threads(threads)
        found = [evaluate(case, "native", torch.bfloat16) for case in own]
    finally:
        torch.set_num_threads(before)
    for case, a, b in zip(own, expected, found, strict=True):
        for name in a:
            assert torch.equal(a[name], b[name]), f"{case.name}: {name} differs with {threads} threads"


def test_fp16_and_double_take_the_reference_on_the_cpu():
    for dtype in (torch.float16, torch.float64):
        x = R(4, 64).to(dtype)
        a, b = x.chunk(2, -1)
        assert_no_worse_than(
            pcs_kernels.geglu(x), a.double() * torch.nn.functional.gelu(b.double()), a * torch.nn.functional.gelu(b)
        )


@pytest.mark.parametrize("name", COMPILED)
def test_a_second_derivative_is_refused(name):
    """A backward is a kernel without a gradient of its own: a second derivative would silently leave it out."""
    call, make = COMPILED[name]
    inputs = [x.requires_grad_() for x in make()]
    (first,) = torch.autograd.grad(call(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_token_weights_that_ask_for_a_gradient_are_refused():
    q, k = R(1, 2, 9, 8).requires_grad_(), R(1, 2, 7, 8)
    with pytest.raises(ValueError, match="capture takes no gradient"):
        pcs_kernels.cross_attention(q, k, k, torch.ones(1, 2, 7, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("c", "o"), [(97, 110), (11, 80), (257, 33)])
def test_an_unpacked_linear_product_is_torchs_own(dtype, c, o):
    """Bit for bit, whatever torch's matrix product makes of these sizes."""
    x, weight, bias, dy = R(5, c).to(dtype), R(o, c).to(dtype), R(o).to(dtype), R(5, o).to(dtype)
    leaf = x.clone().requires_grad_()
    y = pcs_kernels.frozen_linear(leaf, weight, bias, pack=False)
    y.backward(dy)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias)) and torch.equal(leaf.grad, dy @ weight)
