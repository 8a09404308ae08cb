"""Every Triton kernel in Triton's interpreter, on the CPU, against the float64 reference.

Runs in a process of its own with TRITON_INTERPRET=1 (tests/test_triton_interpreter.py starts it): the interpreter is
chosen when a kernel is defined. By default in float32: tests/test_ptx.py executes the same kernels as compiled, in
bfloat16 and float16. With PCS_EVERY_CASE=1 in float16 and more shapes too; never in bfloat16, whose matrices the
interpreter multiplies wrongly.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from pcs_kernels._launch import INTERPRETED
from pcs_kernels.ops.adamw8bit import reference as adamw_reference
from pcs_kernels.ops.adamw8bit import triton_impl as adamw
from pcs_kernels.ops.adamw8bit.codes import code_map
from pcs_kernels.ops.adamw8bit.row import COUNT, TAKEN, host_row
from pcs_kernels.ops.cross_attention import reference as cross_reference
from pcs_kernels.ops.cross_attention import triton_impl as cross
from pcs_kernels.ops.cross_attention.op import Needs as CrossNeeds
from pcs_kernels.ops.frozen_conv import reference as conv_reference
from pcs_kernels.ops.frozen_conv import triton_impl as conv
from pcs_kernels.ops.geglu import reference as geglu_reference
from pcs_kernels.ops.geglu import triton_impl as geglu
from pcs_kernels.ops.group_norm_silu import reference as norm_reference
from pcs_kernels.ops.group_norm_silu import triton_impl as norm
from pcs_kernels.ops.group_norm_silu.op import Needs as NormNeeds
from pcs_kernels.ops.lowrank_residual import reference as lowrank_reference
from pcs_kernels.ops.lowrank_residual import triton_impl as lowrank
from pcs_kernels.ops.lowrank_residual.op import Needs as LowrankNeeds
from pcs_kernels.ops.self_attention import reference as attention_reference
from pcs_kernels.ops.self_attention import triton_impl as attention
from tests.closeness import assert_no_worse_than
from tests.every_case import EVERY_CASE, cases

dtypes = pytest.mark.parametrize("dtype", cases([torch.float32], [torch.float16]), ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    """Uninitialised memory holds NaN, so that an element nobody wrote is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def test_kernels_are_interpreted():
    assert os.environ.get("TRITON_INTERPRET") == "1" and INTERPRETED


def exact(x):
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def check(actual, function, *args, names: str) -> None:
    """Each of `actual` against function(*args) in float64, allowed what function(*args) itself errs."""
    truth = function(*map(exact, args))
    low = function(*args)
    results = (r if isinstance(r, tuple) else (r,) for r in (actual, truth, low))
    for name, a, t, l in zip(names.split(), *results, strict=True):
        assert_no_worse_than(a, t, l, name)


def heads_last(batch: int, heads: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, rows, heads, width).to(dtype).transpose(1, 2)


@dtypes
@pytest.mark.parametrize("shape", ((2, 63, 682), (1, 2), (77, 10)), ids=str)
def test_geglu(shape, dtype):
    x = (2 * torch.randn(shape)).to(dtype)
    dy = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    check(geglu.forward(x), geglu_reference.forward, x, names="y")
    check(geglu.backward(dy, x), geglu_reference.backward, dy, x, names="dx")
    strided = x.t().contiguous().t() if x.dim() == 2 else x[:, ::2]
    dy = dy if x.dim() == 2 else dy[:, ::2]
    check(geglu.backward(dy, strided), geglu_reference.backward, dy, strided, names="dx")


def norm_input(layout: str, dtype: torch.dtype) -> tuple[Tensor, int]:
    if layout == "channels_last":
        return (torch.randn(2, 341, 3, 7) * 2 + 5).to(dtype).contiguous(memory_format=torch.channels_last), 11
    if layout == "nchw":
        return (torch.randn(1, 64, 9, 33) - 3).to(dtype), 32
    if layout == "tokens":
        return torch.randn(2, 12, 5).to(dtype), 4
    if layout == "permuted":
        return torch.randn(4, 2, 4, 6).to(dtype).permute(1, 3, 0, 2), 3
    assert layout == "one pixel"
    return torch.randn(2, 8, 1, 1).to(dtype), 2


@dtypes
@pytest.mark.parametrize("pieces", (False, True), ids=("whole groups", "pieces"))
@pytest.mark.parametrize("silu", (True, False), ids=("silu", "plain"))
@pytest.mark.parametrize("layout", ("channels_last", "nchw", "tokens", "permuted", "one pixel"))
def test_group_norm_silu(layout, silu, pieces, dtype, monkeypatch):
    if not EVERY_CASE and not silu and layout in ("channels_last", "nchw"):
        pytest.skip("without SiLU the larger two are read alike: PCS_EVERY_CASE=1")
    if pieces:  # as an image whose groups no program can hold
        monkeypatch.setattr(norm, "GROUP_TILE", 0)
        monkeypatch.setattr(norm, "GROUP_BACKWARD_TILE", 0)
    x, groups = norm_input(layout, dtype)
    dy = torch.randn(x.shape).to(dtype)
    weight, bias = torch.randn(x.shape[1]).to(dtype), torch.randn(x.shape[1])
    if layout == "tokens":
        weight = bias = None
    result = norm.forward(x, groups, weight, bias, 1e-5, silu)
    assert result[0].stride() == torch.empty_like(x).stride()
    check(result, norm_reference.forward, x, groups, weight, bias, 1e-5, silu, names="y mean rstd")
    _, mean, rstd = result
    call = dy, x, mean, rstd, groups, weight, bias, silu
    everything = NormNeeds(True, True, True)
    check(norm.backward(*call, everything), norm_reference.backward, *call, everything, names="dx dweight dbias")
    only_bias = norm.backward(*call, NormNeeds(False, False, True))
    assert only_bias[0].numel() == 0 and only_bias[1].numel() == 0


# batch, heads, queries, tokens, width, groups
CROSS_SHAPES = (
    (2, 2, 63, 77, 40, 2),
    (1, 2, 1, 1, 64, 0),
    (1, 3, 17, 33, 80, 6),
    (1, 1, 5, 320, 160, 1),
    (2, 1, 70, 16, 8, 3),
)


@dtypes
@pytest.mark.parametrize("shape", CROSS_SHAPES, ids=str)
def test_cross_attention(shape, dtype):
    batch, heads, n, t, d, groups = shape
    q, k = heads_last(batch, heads, n, d, dtype), heads_last(batch, heads, t, d, dtype)
    v = torch.randn(batch, heads, t, d).to(dtype)
    capture = torch.rand(batch, groups, t) if groups else None
    scale = d**-0.5
    out, maps = cross.forward(q, k, v, capture, scale)
    assert out.transpose(1, 2).is_contiguous() and maps.dtype == torch.float32
    check((out, maps), cross_reference.forward, q, k, v, capture, scale, names="out maps")
    dout = torch.randn(batch, heads, n, d).to(dtype)
    dmaps = torch.randn(batch, groups, n) if groups else None
    for given in ((dout, dmaps), (None, dmaps), (dout, None)):
        if given != (None, None):
            call = *given, q, k, v, capture, scale, CrossNeeds(True, True, True)
            check(cross.backward(*call), cross_reference.backward, *call, names="dq dk dv")


@pytest.mark.parametrize("needs", ((True, False, False), (False, True, False), (False, False, True)), ids=str)
def test_cross_attention_gives_only_the_needed_gradients(needs):
    q, k = heads_last(1, 2, 33, 40, torch.float32), heads_last(1, 2, 77, 40, torch.float32)
    call = torch.randn(q.shape), None, q, k, k, None, 0.2
    wanted = cross.backward(*call, CrossNeeds(True, True, True))
    for needed, gradient, full in zip(needs, cross.backward(*call, CrossNeeds(*needs)), wanted, strict=True):
        assert torch.equal(gradient, full) if needed else gradient.numel() == 0


def test_cross_attention_on_a_card_of_little_shared_memory(monkeypatch):
    """Without loads ahead, and with rows saved that nobody reads, it computes the same."""
    q, k = heads_last(1, 2, 33, 40, torch.float32), heads_last(1, 2, 77, 40, torch.float32)
    calls = (
        lambda: cross.forward(q, k, k, torch.rand(1, 2, 77), 0.2)[0],
        lambda: cross.backward(q, None, q, k, k, None, 0.2, CrossNeeds(True, False, False))[0],
    )
    ample = [call() for call in calls]
    monkeypatch.setitem(cross.SHARED_LIMIT, 80, 1024)
    for call, expected in zip(calls, ample, strict=True):
        assert torch.equal(call(), expected)


ATTENTION_SHAPES = (2, 2, 63, 63, 40), (1, 2, 1, 3, 64), (1, 3, 17, 77, 80), (1, 1, 130, 35, 160), (2, 1, 70, 16, 8)


@dtypes
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_self_attention(shape, dtype):
    batch, heads, n, m, d = shape
    q, k = heads_last(batch, heads, n, d, dtype), heads_last(batch, heads, m, d, dtype)
    v = torch.randn(batch, heads, m, d).to(dtype)
    scale = d**-0.5
    out, lse = attention.forward(q, k, v, scale)
    assert out.transpose(1, 2).is_contiguous()
    check((out, lse), attention_reference.forward, q, k, v, scale, names="out lse")
    call = torch.randn(q.shape).to(dtype), q, k, v, out, lse, scale
    check(attention.backward(*call), attention_reference.backward, *call, names="dq dk dv")


def test_self_attention_to_one_key():
    """The value itself; the gradients of query and key are differences of equal numbers: next to nothing."""
    q, k, v, dout = (torch.randn(1, 1, 2, 64).transpose(1, 2) for _ in range(4))
    out, lse = attention.forward(q, k, v, 0.125)
    torch.testing.assert_close(out, v)
    dq, dk, dv = attention.backward(dout, q, k, v, out, lse, 0.125)
    assert float(dq.abs().max()) < 1e-5 and float(dk.abs().max()) < 1e-5
    torch.testing.assert_close(dv, dout)


# batch, rows, inputs, outputs, rank, concepts in the stack (0: one adapter), mask, bias
LOWRANK_SHAPES = (
    (1, 63, 341, 77, 4, 0, True, True),
    (3, 40, 48, 64, 16, 2, True, True),
    (1, 1, 16, 8, 1, 0, False, False),
    (2, 33, 64, 130, 64, 3, True, False),
    (2, 33, 64, 130, 40, 0, False, True),
)


@dtypes
@pytest.mark.parametrize("strided", (False, True), ids=("rows", "columns"))
@pytest.mark.parametrize("shape", LOWRANK_SHAPES, ids=str)
def test_lowrank_residual(shape, strided, dtype):
    batch, rows, ins, outs, rank, concepts, masked, biased = shape
    if not EVERY_CASE and not strided and rank > 32:
        pytest.skip("a large rank changes nothing in how rows are read: PCS_EVERY_CASE=1")
    stack = (concepts,) if concepts else ()
    x, dy = torch.randn(batch, rows, ins).to(dtype), torch.randn(batch, rows, outs).to(dtype)
    if strided:
        x, dy = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, dy))
    weight = (torch.randn(outs, ins) / ins**0.5).to(dtype)
    bias = torch.randn(outs).to(dtype) if biased else None
    down, up = torch.randn(*stack, rank, ins) / ins**0.5, torch.randn(*stack, outs, rank)
    mask = torch.rand(batch, rows) if masked else None
    index = torch.arange(batch) % concepts if concepts else None
    call = x, weight, bias, down, up, mask, 0.7, index
    check(lowrank.forward(*call), lowrank_reference.forward, *call, names="y")
    call = dy, x, weight, down, up, mask, 0.7, index
    names = "dx dweight dbias ddown dup dmask"
    for needs in (LowrankNeeds(*[True] * 6), LowrankNeeds(False, False, False, True, True, True)):
        check(lowrank.backward(*call, needs), lowrank_reference.backward, *call, needs, names=names)
    only_x = LowrankNeeds(True, False, False, False, False, False)
    assert lowrank.backward(dy, None, *call[2:], only_x)[0].shape == x.shape


# batch, inputs, outputs, height, width, kernel, stride, padding, channels-last
CONV_SHAPES = (2, 35, 21, 7, 9, 3, 1, 1, True), (1, 4, 8, 8, 8, 3, 2, 1, False), (1, 16, 16, 1, 1, 1, 1, 0, False)


@dtypes
@pytest.mark.parametrize("shape", CONV_SHAPES, ids=str)
def test_frozen_conv(shape, dtype):
    batch, ins, outs, height, width, kernel, stride, padding, channels_last = shape
    x, weight = torch.randn(batch, ins, height, width).to(dtype), torch.randn(outs, ins, kernel, kernel).to(dtype)
    bias = torch.randn(outs).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    call = x, weight, bias, stride, padding, True
    y = conv.forward_conv(*call)
    check(y, conv_reference.forward_conv, *call, names="y")
    call = torch.randn(y.shape).to(dtype), weight, height, width, stride, padding, True
    check(conv.backward_conv(*call), conv_reference.backward_conv, *call, names="dx")
    call = torch.randn(3, 5, ins).to(dtype), weight[:, :, 0, 0], bias, True
    check(conv.forward_linear(*call), conv_reference.forward_linear, *call, names="linear")
    call = torch.randn(3, 5, outs).to(dtype), weight[:, :, 0, 0], True
    check(conv.backward_linear(*call), conv_reference.backward_linear, *call, names="linear_dx")


def adamw_state(n: int, block_size: int) -> list[Tensor]:
    count = -(-n // block_size)
    codes = [torch.randint(0, 256, (n,), dtype=torch.uint8) for _ in range(2)]
    return [*codes, torch.rand(count), torch.rand(count)]


@pytest.mark.parametrize("decay_first", (True, False), ids=("decay first", "decay last"))
@pytest.mark.parametrize("n, block_size", ((1, 256), (5003, 256), (300, 64), (999, 100)))
def test_adamw8bit_matches_the_reference(n, block_size, decay_first):
    grad, param, state = torch.randn(n), torch.randn(n), adamw_state(n, block_size)
    results = []
    for module in (adamw, adamw_reference):
        p, s = param.clone(), [t.clone() for t in state]
        row = host_row(1e-2, 0.9, 0.99, 1e-8, 0.1, 3, 0.5, None, decay_first)
        module.step_8bit(p, grad, *s, code_map(True), code_map(False), row, None, block_size, False)
        assert int(row.view(torch.int32)[COUNT]) == 3
        results.append((p, s))
    (p, s), (p_wanted, s_wanted) = results
    torch.testing.assert_close(p, p_wanted, rtol=1e-6, atol=1e-6)  # eight float32 roundings
    # a value that is halfway between two codes but for a rounding may take either: 1 in 500
    for codes, wanted in zip(s[:2], s_wanted[:2], strict=True):
        distance = (codes.int() - wanted.int()).abs()
        assert int(distance.max()) <= 1 and int(distance.sum()) <= n // 500
    for absmax, wanted in zip(s[2:], s_wanted[2:], strict=True):
        torch.testing.assert_close(absmax, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
def test_adamw8bit_rounds_stochastically_like_the_reference(dtype):
    """Down to 1e-8, which float16 has no digits for: its smallest step is 6e-8."""
    n = 2000
    grad, state = torch.randn(n), adamw_state(n, 256)
    param = (torch.randn(n) * torch.logspace(-8, 1, n)).to(dtype)
    results = []
    for module in (adamw, adamw_reference):
        p, s = param.clone(), [t.clone() for t in state]
        row = host_row(1e-6, 0.9, 0.99, 1e-8, 0.1, 3, 1.0, 12345678901, False)
        module.step_8bit(p, grad, *s, code_map(True), code_map(False), row, None, 256, True)
        results.append(p)
    # a draw can fall the other way only where the float32 values differ in their last bits
    assert int((results[0] != results[1]).sum()) <= 2
    assert float((results[0] != param).float().mean()) > 0.1


def test_adamw8bit_takes_another_code_table():
    table = torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256)
    grad, param, state = torch.randn(300), torch.randn(300), adamw_state(300, 256)
    results = []
    for module in (adamw, adamw_reference):
        p, s = param.clone(), [t.clone() for t in state]
        row = host_row(1e-2, 0.9, 0.99, 1e-8, 0.1, 3, 1.0, None, False)
        module.step_8bit(p, grad, *s, *table, row, None, 256, False)
        results.append(p)
    assert torch.equal(*results)


@pytest.mark.parametrize("flag", ("row", "finite"))
def test_a_refused_step_changes_nothing(flag):
    grad = torch.randn(300)
    for module in (adamw, adamw_reference):
        row = host_row(1e-2, 0.9, 0.99, 1e-8, 0.1, 2, 1.0, None, True)
        row[TAKEN] = float(flag != "row")
        finite = torch.tensor([flag != "finite"])
        eight = [torch.randn(300), *adamw_state(300, 256)]
        full = [torch.randn(300), torch.rand(300), torch.rand(300)]
        before = [t.clone() for t in (*eight, *full, row)]
        module.step_8bit(eight[0], grad, *eight[1:], code_map(True), code_map(False), row, finite, 256, False)
        module.step_32bit(full[0], grad, *full[1:], row, finite, False)
        assert all(torch.equal(a, b) for a, b in zip(before, (*eight, *full, row), strict=True))


def test_adamw32bit_matches_the_reference():
    grad, param = torch.randn(77), torch.randn(77)
    results = []
    for module in (adamw, adamw_reference):
        state = [param.clone(), torch.full((77,), 0.1), torch.full((77,), 0.2)]
        row = host_row(1e-2, 0.9, 0.99, 1e-8, 0.1, 2, 1.0, None, True)
        module.step_32bit(state[0], grad, *state[1:], row, None, False)
        results.append(state)
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def test_reasons_name_the_cause_and_the_mend():
    q = torch.randn(1, 1, 4, 512)
    assert "head width 512 is above 256" in attention.reason(q, q, q, 1.0)
    assert "head width 512 is above 256" in cross.reason(q, q, q, None, 1.0)
    assert "bfloat16" in attention.reason(*(q.bfloat16(),) * 3, 1.0)
    assert "float64" in geglu.reason(q.double())
    assert geglu.reason(q.bfloat16()) is None and attention.reason(*(q[..., :64],) * 3, 1.0) is None
