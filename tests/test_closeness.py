"""The tolerance rule itself."""

import torch

from tests.closeness import allowed, assert_no_worse_than


def chain(dtype, count, order):
    """a b c rounded after each product, in one of two orders; and exactly."""
    a, b, c = (torch.randn(count, 3).to(dtype) for _ in range(3))
    exact = a.double() * b.double() * c.double()
    return ((a * b) * c if order else a * (b * c)), exact, (a * b) * c


def test_of_few_values_another_order_of_the_same_roundings_passes():
    found, exact, low = chain(torch.float16, 2000, 0)
    twice = [2 * float((t - e).abs().max()) for t, e in zip(low.double(), exact)]
    errs = [float((f - e).abs().max()) for f, e in zip(found.double(), exact)]
    assert sum(e > t for e, t in zip(errs, twice)) > 50, "torch's own error is small by luck here and there"
    for triple in zip(found, exact, low):
        assert_no_worse_than(*triple)


def test_of_many_values_twice_torchs_error_is_the_limit():
    exact = torch.ones(64, dtype=torch.float64)
    low = (exact + 2e-3).half()
    assert allowed(low, exact, low) < 4.1e-3
    assert allowed(low[:8], exact[:8], low[:8]) > 4.5e-3
