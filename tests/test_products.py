"""Another library's frozen network on our products."""

import pytest
import torch
import torch.nn.functional as F
from pcs_trainer.model.products import on_our_products
from torch import nn

import pcs_kernels
from tests import needs

NETWORK = nn.Sequential(
    nn.Conv2d(5, 24, 3, padding=1),
    nn.SiLU(),
    nn.Conv2d(24, 24, 3, stride=2),
    nn.Conv2d(24, 24, (1, 3), padding="same"),  # these two are left to torch
    nn.Conv2d(24, 24, 3, padding=1, groups=4),
    nn.Flatten(2),
    nn.Linear(16, 10),
    nn.Linear(10, 3, bias=False),
)


@pytest.fixture
def calls(monkeypatch):
    found = []
    for name in ("frozen_conv2d", "frozen_linear"):
        before = getattr(pcs_kernels, name)
        monkeypatch.setattr(pcs_kernels, name, lambda *a, f=before, n=name, **k: found.append(n) or f(*a, **k))
    return found


@needs.native
@pytest.mark.parametrize("multiplies", (False, True))
def test_a_network_on_our_products_errs_no_more_than_on_torchs(multiplies, calls, monkeypatch):
    from pcs_kernels.ops.frozen_conv import native_product

    monkeypatch.setattr(native_product, "multiplies_bfloat16", lambda: multiplies)
    torch.manual_seed(0)
    x = torch.randn(2, 5, 10, 10).bfloat16()
    network = NETWORK.bfloat16()
    with torch.no_grad():
        theirs = network(x)
        with on_our_products(network):
            ours = network(x)
        exact = network.double()(x.double())
    assert calls == ["frozen_conv2d", "frozen_conv2d", "frozen_linear", "frozen_linear"]
    assert torch.equal(ours, theirs) or not multiplies
    assert (ours.double() - exact).norm() <= 1.5 * (theirs.double() - exact).norm() + 1e-3 * exact.norm()
    assert not pcs_kernels._packed._cache or all(root() is None for root, *_ in pcs_kernels._packed._cache.values())


def test_float32_and_gradients_are_left_to_torch(calls):
    x = torch.randn(1, 5, 10, 10)
    with on_our_products(NETWORK.float()), torch.no_grad():
        NETWORK(x)
    with on_our_products(NETWORK.bfloat16()):
        NETWORK(x.bfloat16()).sum().backward()
        assert F.linear(torch.zeros(0, 3).bfloat16(), torch.zeros(2, 3).bfloat16()).shape == (0, 2)
    assert not calls
