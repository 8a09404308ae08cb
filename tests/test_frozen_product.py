"""Products with a frozen weight that the CPU reads as it lies: against float64, and when they run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

import pcs_kernels
from pcs_kernels import Int8Weight
from tests import needs

pytestmark = needs.native

# B, C, H, W, O, kernel, stride, padding: odd widths, images smaller than a vector, more rows and depth than a block
CONVOLUTIONS = [
    (2, 37, 9, 11, 53, 3, 1, 1),
    (1, 64, 8, 8, 64, 3, 2, 1),
    (1, 30, 9, 7, 18, 3, 2, 0),
    (1, 4, 16, 16, 32, 3, 1, 1),
    (1, 16, 6, 6, 8, 5, 1, 2),
    (3, 20, 1, 1, 24, 1, 1, 0),
    (1, 300, 3, 5, 70, 3, 1, 1),
    (2, 7, 13, 13, 1400, 1, 1, 0),
    (1, 16, 8, 8, 16, 3, 3, 2),
    (1, 8, 5, 5, 1, 5, 1, 0),
]
LINEARS = [((1, 1), 1), ((129, 320), 48), ((2, 77, 768), 40), ((5, 513), 1300)]
DTYPES = (torch.float32, torch.bfloat16)
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 2**-8}  # relative, of a tensor's norm: bfloat16 rounds the result alone


def product():
    from pcs_kernels.ops.frozen_conv import native_product

    return native_product


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def kinds(weight: Tensor) -> dict[str, tuple[Tensor | Int8Weight, Tensor]]:
    """The weight in each form, and what that form stands for in float64."""
    q = pcs_kernels.quantize_weight(weight)
    found = {
        "plain": (weight.contiguous(), weight.double()),
        "8 bits": (q, pcs_kernels.expand_weight(q, torch.float64)),
        "in gaps": (torch.stack((weight, weight), -1)[..., 0], weight.double()),
    }
    if weight.dim() == 4:
        found["channels last"] = weight.contiguous(memory_format=torch.channels_last), weight.double()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_convolutions_are_exact_in_both_directions(shape, dtype):
    batch, ins, height, width, outs, kernel, stride, padding = shape
    torch.manual_seed(0)
    x = torch.randn(batch, ins, height, width, dtype=dtype)
    weight = (torch.randn(outs, ins, kernel, kernel) * (ins * kernel**2) ** -0.5).to(dtype)
    bias = torch.randn(outs, dtype=dtype)
    for name, (held, exact) in kinds(weight).items():
        y = F.conv2d(x.double(), exact, bias.double(), stride, padding)
        dy = torch.randn_like(y).to(dtype)
        dx = conv2d_input(x.shape, exact, dy.double(), stride, padding)
        for order in (torch.contiguous_format, torch.channels_last):
            given, seed = x.contiguous(memory_format=order), dy.contiguous(memory_format=order)
            found = product().forward_conv(given, held, bias, stride, padding)
            assert distance(found, y) < CLOSE[dtype], name
            assert found.shape == y.shape and found.dtype == dtype
            back = product().backward_conv(seed, held, height, width, stride, padding)
            assert distance(back, dx) < CLOSE[dtype] if dx.any() else not back.any(), name
            bare = product().forward_conv(given, held, None, stride, padding)
            assert distance(bare, y - bias.double().view(-1, 1, 1)) < CLOSE[dtype], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_do_not_depend_on_how_a_plain_weight_lies(dtype):
    """A network that was trained channels-last and the same one from its file predict the same."""
    x, weight = torch.randn(2, 70, 9, 9, dtype=dtype), torch.randn(90, 70, 3, 3, dtype=dtype)
    other, dy = weight.contiguous(memory_format=torch.channels_last), torch.randn(2, 90, 9, 9, dtype=dtype)
    assert torch.equal(product().forward_conv(x, weight, None, 1, 1), product().forward_conv(x, other, None, 1, 1))
    back = [product().backward_conv(dy, w, 9, 9, 1, 1) for w in (weight, other)]
    assert torch.equal(*back)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "outs"), LINEARS, ids=str)
def test_linear_products_are_exact_in_both_directions(shape, outs, dtype):
    torch.manual_seed(0)
    x, bias = torch.randn(shape, dtype=dtype), torch.randn(outs, dtype=dtype)
    weight = (torch.randn(outs, shape[-1]) * shape[-1] ** -0.5).to(dtype)
    for name, (held, exact) in kinds(weight).items():
        y = F.linear(x.double(), exact, bias.double())
        dy = torch.randn_like(y).to(dtype)
        assert distance(product().forward_linear(x, held, bias), y) < CLOSE[dtype], name
        assert distance(product().backward_linear(dy, held), dy.double() @ exact) < CLOSE[dtype], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*CONVOLUTIONS, (2, 270, 17, 17, 800, 1, 1, 0)], ids=str)
def test_gradients_of_weights_are_exact_and_lie_as_the_weights(shape, dtype):
    batch, ins, height, width, outs, kernel, stride, padding = shape
    torch.manual_seed(0)
    x, weight = torch.randn(batch, ins, height, width, dtype=dtype), torch.empty(outs, ins, kernel, kernel, dtype=dtype)
    dy = torch.randn_like(F.conv2d(x, weight, None, stride, padding))
    exact = conv2d_weight(x.double(), weight.shape, dy.double(), stride, padding)
    for order in (torch.contiguous_format, torch.channels_last):
        found = product().weight_gradient(x, dy, weight.contiguous(memory_format=order), stride, padding)
        assert distance(found, exact) < CLOSE[dtype]
        assert found.is_contiguous(memory_format=order) and found.dtype == dtype
    apart = torch.empty(outs, 2 * ins, kernel, kernel, dtype=dtype)[:, ::2]
    assert torch.equal(product().weight_gradient(x, dy, apart, stride, padding), found)


@pytest.mark.parametrize("threads", (1, 2, 5))
def test_every_number_of_threads_gives_the_same_numbers(threads):
    x, weight = torch.randn(2, 40, 12, 12), torch.randn(700, 40, 3, 3)
    alone = product().forward_conv(x, weight, None, 1, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(product().forward_conv(x, weight, None, 1, 1), alone)
    finally:
        torch.set_num_threads(before)


def test_a_value_that_is_not_finite_spreads_as_far_as_it_must():
    x, weight = torch.randn(1, 20, 6, 6), torch.randn(5, 20, 3, 3)
    weight[2, 3, 1, 1] = float("nan")
    for held in (weight, pcs_kernels.quantize_weight(weight)):
        y = product().forward_conv(x, held, None, 1, 1)
        assert bool(y[:, 2].isnan().all()) and bool(y[:, [0, 1, 3, 4]].isfinite().all())
        dx = product().backward_conv(torch.zeros(1, 5, 6, 6), held, 6, 6, 1, 1)
        assert bool(dx[:, 3].isnan().all())


def test_a_cpu_without_products_of_bfloat16_packs_nothing(monkeypatch):
    from pcs_kernels import _packed, costs

    monkeypatch.setattr(product(), "multiplies_bfloat16", lambda: False)
    x, weight = torch.randn(1, 16, 8, 8).bfloat16(), torch.randn(24, 16, 3, 3).bfloat16()
    forward = torch.ops.pcs_kernels.frozen_conv2d_forward
    for dtype, packs in ((torch.bfloat16, False), (torch.float32, True)):
        pcs_kernels.forget_packed_weights()
        a, w = x.to(dtype).detach().requires_grad_(), weight.to(dtype)
        pcs_kernels.frozen_conv2d(a, w).sum().backward()
        assert bool(_packed._cache) == packs
        assert (costs.packed_weight(forward, (a, w, None, 1, 1, True, ""), {}) is not None) == packs
        exact = conv2d_input(a.shape, w.double(), torch.ones(1, 24, 8, 8).double(), 1, 1)
        assert distance(a.grad, exact) < CLOSE[dtype]


@pytest.mark.parametrize("multiplies", (False, True))
def test_8_bit_weights_are_expanded_only_where_that_is_faster(multiplies, monkeypatch):
    from pcs_kernels.ops.frozen_conv import codes

    monkeypatch.setattr(product(), "multiplies_bfloat16", lambda: multiplies)
    expanded = []
    lent = codes.lent_weight
    monkeypatch.setattr(codes, "lent_weight", lambda weight, dtype: expanded.append(dtype) or lent(weight, dtype))
    q, m = (pcs_kernels.quantize_weight(torch.randn(24, 16, kernel, kernel)) for kernel in (3, 1))
    for dtype in DTYPES:
        x = torch.randn(1, 16, 8, 8, dtype=dtype, requires_grad=True)
        pcs_kernels.frozen_conv2d(x, q).sum().backward()
        rows = torch.randn(7, 16, dtype=dtype, requires_grad=True)
        pcs_kernels.frozen_linear(rows, m).sum().backward()
    assert expanded == [torch.bfloat16] * 4 * multiplies
    with pcs_kernels.backend("reference"):
        pcs_kernels.frozen_linear(rows.detach(), m)
    assert expanded[-1:] == [torch.bfloat16]


def test_which_cpus_multiply_bfloat16():
    product().multiplies_bfloat16.cache_clear()
    import platform

    if platform.machine().lower() in ("x86_64", "amd64"):
        from pcs_kernels import _cpuid

        assert product().multiplies_bfloat16() == (_cpuid.best() in ("avx512", "amx"))
