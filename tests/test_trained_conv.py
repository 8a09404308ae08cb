"""The convolution whose weight trains: torch's values and gradients, and the memory the gradient comes in."""

import pytest
import torch
import torch.nn.functional as F

import pcs_kernels


@pytest.mark.parametrize("form", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize(
    ("size", "stride", "padding", "side"), ((3, 1, 1, 6), (3, 2, 1, 6), (3, 2, 1, 7), (1, 1, 0, 6), (3, 1, 0, 5))
)
def test_bfloat16_errs_no_more_than_torch(size, stride, padding, side, form):
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


def test_only_what_is_asked_for_gets_a_gradient():
    x, weight = torch.randn(1, 8, 3, 3).bfloat16(), torch.randn(16, 8, 3, 3).bfloat16().requires_grad_()
    pcs_kernels.trained_conv2d(x, weight, None, 1, 1).sum().backward()
    assert x.grad is None and weight.grad is not None


def test_a_large_picture_takes_torch_s_own():
    x, weight = torch.randn(1, 8, 9, 9), torch.randn(4, 8, 3, 3)
    assert torch.equal(pcs_kernels.trained_conv2d(x, weight, None, 1, 1), F.conv2d(x, weight, None, 1, 1))


def test_a_forced_reference_is_torch_s_own():
    x, weight = torch.randn(1, 8, 3, 3).bfloat16(), torch.randn(16, 8, 3, 3).bfloat16()
    with pcs_kernels.backend("reference"):
        assert torch.equal(pcs_kernels.trained_conv2d(x, weight, None, 1, 1), F.conv2d(x, weight, None, 1, 1))
