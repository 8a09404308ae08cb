"""The modules: torch's state_dicts, torch's values, and nothing trained that is frozen."""

import pytest
import torch

from pcs_kernels import nn

PAIRS = [
    (nn.GroupNormSiLU(4, 8), torch.nn.Sequential(torch.nn.GroupNorm(4, 8), torch.nn.SiLU()), torch.randn(2, 8, 5, 5)),
    (nn.FrozenLinear(8, 6), torch.nn.Linear(8, 6), torch.randn(3, 8)),
    (nn.FrozenConv2d(8, 6, 3, 2, 1), torch.nn.Conv2d(8, 6, 3, 2, 1), torch.randn(2, 8, 7, 7)),
]


@pytest.mark.parametrize(("ours", "theirs", "x"), PAIRS, ids=("norm", "linear", "conv"))
def test_same_values_from_the_same_state(ours, theirs, x):
    ours.load_state_dict((theirs[0] if isinstance(theirs, torch.nn.Sequential) else theirs).state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_geglu():
    gate = nn.GEGLU(8, 12)
    a, b = torch.nn.functional.linear(x := torch.randn(3, 8), gate.weight, gate.bias).chunk(2, -1)
    torch.testing.assert_close(gate(x), a * torch.nn.functional.gelu(b))


def test_frozen_modules_have_nothing_to_train():
    for module in (nn.FrozenLinear(4, 4), nn.FrozenConv2d(4, 4, 1)):
        assert not any(p.requires_grad for p in module.parameters())
    with pytest.raises(ValueError, match="one stride and one padding"):
        nn.FrozenConv2d(4, 4, 3, padding=(1, 0))


@pytest.mark.parametrize("projection", (torch.nn.Linear(8, 6), torch.nn.Conv2d(8, 6, 1)))
def test_lowrank_residual_starts_as_the_projection_and_trains_only_itself(projection):
    module = nn.LowrankResidual(projection, rank=2)
    x = torch.randn(5, 8)
    plain = torch.nn.functional.linear(x, projection.weight.flatten(1), projection.bias)
    torch.testing.assert_close(module(x), plain)
    module(x).square().sum().backward()
    assert module.up.grad.abs().sum() > 0
    assert projection.weight.grad is None
