"""Weights in 8 bits: what the codes are, on every backend, and what products with them keep for the backward."""

import pytest
import torch
from pcs_trainer.memory.ledger import Ledger

import pcs_kernels
from pcs_kernels import Int8Weight
from pcs_kernels.ops.int8_weight import reference
from tests import needs

SHAPES = ((3, 64), (5, 341), (7, 1), (4, 64, 3, 3), (6, 20, 3, 3), (2, 320, 1, 1))


def weight_of(shape, dtype=torch.float32):
    torch.manual_seed(3)
    w = torch.randn(shape).to(dtype)
    return w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w


def rows_of(w):
    """[O, K] in the order of the blocks."""
    return (w.permute(0, 2, 3, 1) if w.dim() == 4 else w).flatten(1)


@pytest.mark.parametrize("backend", needs.CPU_BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_code_is_the_nearest_and_no_value_is_cut_off(shape, backend):
    w = weight_of(shape)
    with pcs_kernels.backend(backend):
        q = pcs_kernels.quantize_weight(w)
        found = rows_of(pcs_kernels.expand_weight(q, torch.float32))
    rows = rows_of(w)
    scales = q.scales.view(torch.bfloat16).float().repeat_interleave(64, 1)[:, : rows.shape[1]]
    assert q.codes.shape == w.shape and q.codes.dtype == torch.int8 and q.codes.abs().max() <= 127
    assert bool(((found - rows).abs() <= scales / 2 * (1 + 1e-6)).all())
    # the scale is the least bfloat16 that reaches the largest value: one step of it is 1/128 at most
    for o in range(rows.shape[0]):
        for b, block in enumerate(rows[o].split(64)):
            most, scale = float(block.abs().max()), float(q.scales.view(torch.bfloat16)[o, b])
            assert most / 127 <= scale <= most / 127 * (1 + 1 / 128)


@needs.native
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_codes_scales_and_weights_are_the_references_bit_for_bit(shape, dtype):
    w = weight_of(shape, dtype)
    found = {}
    for backend in ("reference", "native"):
        with pcs_kernels.backend(backend):
            q = pcs_kernels.quantize_weight(w)
            found[backend] = (*q, pcs_kernels.expand_weight(q, dtype))
    for a, b in zip(found["reference"], found["native"], strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("backend", needs.CPU_BACKENDS)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_a_value_that_is_not_finite_is_not_made_a_number(value, backend):
    w = weight_of((3, 130))
    w[1, 100] = value
    with pcs_kernels.backend(backend):
        scales = pcs_kernels.quantize_weight(w).scales.view(torch.bfloat16)
    assert not bool(scales[1, 1].isfinite()) and int(scales.isfinite().sum()) == scales.numel() - 1


@pytest.mark.parametrize("backend", needs.CPU_BACKENDS)
def test_a_block_of_zeros_is_zeros(backend):
    w = weight_of((2, 128))
    w[0, :64] = 0
    w[1] = 0
    with pcs_kernels.backend(backend):
        found = pcs_kernels.expand_weight(pcs_kernels.quantize_weight(w), torch.float32)
    assert bool((found[0, :64] == 0).all()) and bool((found[1] == 0).all()) and bool(found[0, 64:].any())


def test_quantizing_makes_little_beside_the_codes():
    """On a GPU a weight is quantized while the network is loaded, and the plan of a run has no room for more."""
    w = torch.randn(1280, 640, 3, 3).bfloat16()
    with Ledger([w]) as ledger:
        codes, scales = reference.quantize(w)
    assert ledger.result().peak < 2 * codes.nbytes + 2 * scales.nbytes + 32 * reference.AT_ONCE


def calls():
    x = torch.randn(2, 64, 6, 6).contiguous(memory_format=torch.channels_last)
    conv = pcs_kernels.quantize_weight(torch.randn(32, 64, 3, 3))
    linear = pcs_kernels.quantize_weight(torch.randn(32, 64))
    down, up = torch.randn(2, 64), torch.randn(32, 2)
    yield "conv", x, conv, lambda x: pcs_kernels.frozen_conv2d(x, conv)
    yield "linear", x[0, :, :, 0].t(), linear, lambda x: pcs_kernels.frozen_linear(x, linear)
    yield "lowrank", torch.randn(3, 64), linear, lambda x: pcs_kernels.lowrank_residual(x, linear, None, down, up)


@pytest.mark.parametrize("which", ("conv", "linear", "lowrank"))
def test_codes_and_scales_are_kept_and_no_expanded_weight(which):
    x, q, call = next((x, q, call) for name, x, q, call in calls() if name == which)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(x.clone().requires_grad_())
    places = {t.untyped_storage().data_ptr() for t in q}
    large = [t for t in kept if t.untyped_storage().data_ptr() not in places and t.numel() > 200]
    assert places <= {t.untyped_storage().data_ptr() for t in kept} and not large


@needs.native
@pytest.mark.parametrize("which", ("conv", "linear", "lowrank"))
def test_no_packed_copy_is_kept(which):
    from pcs_kernels import _packed

    x, _, call = next((x, q, call) for name, x, q, call in calls() if name == which)
    pcs_kernels.forget_packed_weights()
    with pcs_kernels.packing("both"):
        call(x.clone().requires_grad_()).sum().backward()
    assert all(root() is not None and root().numel() < 200 for root, _, _ in _packed._cache.values())  # the adapter's


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_products_are_those_of_the_weight_that_is_held(dtype):
    for name, x, q, call in calls():
        x = x.to(dtype)
        if name == "lowrank":
            continue
        whole = pcs_kernels.expand_weight(q, dtype)
        plain = pcs_kernels.frozen_conv2d if name == "conv" else pcs_kernels.frozen_linear
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        with pcs_kernels.backend("reference"):  # a native product multiplies the codes: tests/test_frozen_product.py
            ya, yb = call(a), plain(b, whole, pack=False)
            seed = torch.randn_like(ya)
            ya.backward(seed), yb.backward(seed)
        assert torch.equal(ya, yb) and torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("which", ("conv", "linear", "lowrank"))
def test_a_compiled_graph_takes_a_weight_in_8_bits_whole(which):
    x, call = next((x, call) for name, x, _, call in calls() if name == which)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, call(x))


def test_what_is_no_weight_in_8_bits_is_refused():
    good = pcs_kernels.quantize_weight(torch.randn(4, 100))
    x = torch.randn(2, 100)
    for codes, scales, said in (
        (good.codes.float(), good.scales, "codes must be torch.int8"),
        (good.codes, good.scales.float(), "scales must be torch.int16"),
        (good.codes, good.scales[:, :1], r"scales must be \[O, ceil\(inputs / 64\)\]"),
        (good.codes.t().contiguous().t(), good.scales, "in the order that quantize gives"),
        (good.codes, None, "scales must be a torch.Tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            pcs_kernels.frozen_linear(x, Int8Weight(codes, scales))
    with pytest.raises(ValueError, match="x has 90 channels"):
        pcs_kernels.frozen_linear(torch.randn(2, 90), good)
    with pytest.raises(ValueError, match=r"weight must be \[O, C\]"):
        pcs_kernels.quantize_weight(torch.randn(5))
