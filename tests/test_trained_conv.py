"""The convolution whose weight trains: torch's values and gradients, and the memory the gradient comes in."""

import pytest
import torch
import torch.nn.functional as F

import pcs_kernels
from pcs_kernels.ops.trained_conv.op import _native
from tests import needs


@pytest.fixture(params=("multiplies bfloat16", pytest.param("does not", marks=needs.native)))
def cpu(request, monkeypatch):
    """A CPU that multiplies bfloat16, where torch's products run, and one that does not, where ours do."""
    if _native() is not None:
        from pcs_kernels.ops.frozen_conv import native_product

        monkeypatch.setattr(native_product, "multiplies_bfloat16", lambda: request.param == "multiplies bfloat16")
    return request.param


@pytest.mark.parametrize("form", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize(
    ("size", "stride", "padding", "side"), ((3, 1, 1, 6), (3, 2, 1, 6), (3, 2, 1, 7), (1, 1, 0, 6), (3, 1, 0, 5))
)
def test_bfloat16_errs_no_more_than_torch(size, stride, padding, side, form, cpu):
    torch.manual_seed(0)
    exact = [torch.randn(2, 40, side, side), torch.randn(80, 40, size, size) / (size * 40**0.5), torch.randn(80)]
    low = [t.bfloat16() for t in exact]
    low[:2] = [t.contiguous(memory_format=form) for t in low[:2]]

    def run(call, inputs):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        y = call(*leaves, stride, padding)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape).bfloat16().to(y.dtype))
        return [y.detach(), *(p.grad for p in leaves)]

    truth = run(F.conv2d, [t.double() for t in low])
    ours, theirs = run(pcs_kernels.trained_conv2d, low), run(F.conv2d, low)
    for found, peer, true in zip(ours, theirs, truth, strict=True):
        assert found.shape == true.shape
        error, allowed = (found.double() - true).norm(), (peer.double() - true).norm()
        # half of torch's own error more, for one more rounding to bfloat16 (4e-3), and a quarter of one as the floor
        assert error <= 1.5 * allowed + 1e-3 * true.norm()
    if form == torch.channels_last and size == 3:
        assert ours[2].is_contiguous(memory_format=torch.channels_last)


def test_only_what_is_asked_for_gets_a_gradient(cpu):
    x, weight = torch.randn(1, 8, 3, 3).bfloat16(), torch.randn(16, 8, 3, 3).bfloat16().requires_grad_()
    pcs_kernels.trained_conv2d(x, weight, None, 1, 1).sum().backward()
    assert x.grad is None and weight.grad is not None


def test_a_linear_product_errs_no_more_than_torch(cpu):
    torch.manual_seed(0)
    low = [torch.randn(2, 7, 90).bfloat16(), (torch.randn(130, 90) / 9).bfloat16(), torch.randn(130).bfloat16()]
    seed = torch.randn(2, 7, 130).bfloat16()
    results = []
    for call, inputs in (
        (F.linear, [t.double() for t in low]),
        (pcs_kernels.trained_linear, low),
        (F.linear, low),
        (lambda x, w, b: pcs_kernels.trained_linear(x.transpose(0, 1), w, None).transpose(0, 1) + b, low),
    ):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        y = call(*leaves)
        y.backward(seed.to(y.dtype))
        results.append([y.detach(), *(p.grad for p in leaves)])
    truth, ours, theirs, parted = results
    for found, peer, turned, true in zip(ours, theirs, parted, truth, strict=True):
        error, allowed = (found.double() - true).norm(), (peer.double() - true).norm()
        assert found.shape == true.shape and error <= 1.5 * allowed + 1e-3 * true.norm()
        assert (turned.double() - true).norm() <= 3 * allowed + 1e-3 * true.norm()


def test_float32_and_whoever_watches_get_torch_s_own(cpu):
    x, weight = torch.randn(3, 8), torch.randn(16, 8)
    assert torch.equal(pcs_kernels.trained_linear(x, weight, None), F.linear(x, weight))
    x, weight = x.bfloat16(), weight.bfloat16()
    with pcs_kernels.backend("reference"):
        assert torch.equal(pcs_kernels.trained_linear(x, weight, None), F.linear(x, weight))
    compiled = torch.compile(pcs_kernels.trained_linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, None), F.linear(x, weight))
    with torch.autocast("cpu"):
        assert torch.equal(pcs_kernels.trained_linear(x, weight, None), F.linear(x, weight))


def test_a_large_picture_takes_torch_s_own():
    x, weight = torch.randn(1, 8, 9, 9), torch.randn(4, 8, 3, 3)
    assert torch.equal(pcs_kernels.trained_conv2d(x, weight, None, 1, 1), F.conv2d(x, weight, None, 1, 1))


def test_a_forced_reference_is_torch_s_own():
    x, weight = torch.randn(1, 8, 3, 3).bfloat16(), torch.randn(16, 8, 3, 3).bfloat16()
    with pcs_kernels.backend("reference"):
        assert torch.equal(pcs_kernels.trained_conv2d(x, weight, None, 1, 1), F.conv2d(x, weight, None, 1, 1))


def test_what_does_not_fit_is_refused_in_torchs_words(cpu):
    x, weight = torch.randn(1, 8, 6, 6).bfloat16(), torch.randn(4, 8, 3, 3).bfloat16()
    for given in ((x[:, :4], weight, None), (x, weight, torch.zeros(3).bfloat16()), (x, weight, torch.zeros(4))):
        with pytest.raises(RuntimeError):
            pcs_kernels.trained_conv2d(*given, 1, 1)
    with pytest.raises(RuntimeError):
        pcs_kernels.trained_conv2d(x[..., :1, :1], weight, None, 1, 0)
    with pytest.raises(RuntimeError):
        pcs_kernels.trained_linear(torch.randn(2, 5).bfloat16(), torch.randn(4, 8).bfloat16(), None)


def test_a_negated_view_is_read_with_its_sign(cpu):
    x = torch.view_as_complex(torch.randn(3, 8, 2)).conj().imag.bfloat16()
    negated = torch.complex(x.float(), x.float()).conj().imag  # the negative bit set
    assert negated.is_neg()
    weight = torch.randn(4, 8)
    codes = pcs_kernels.quantize_weight(weight)
    found = pcs_kernels.frozen_linear(negated, codes)
    torch.testing.assert_close(found, pcs_kernels.frozen_linear(negated.resolve_neg(), codes))
    y = pcs_kernels.trained_linear(x, weight.bfloat16(), None)
    assert y.shape == (3, 4)
