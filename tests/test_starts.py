"""What low-rank residuals start from, method by method, against the references."""

from __future__ import annotations

import pytest
import torch
from pcs_trainer.methods.learner import fresh_pair
from pcs_trainer.training.trainer import trainable
from torch import nn


def spread(parameters, ending):
    return float(torch.cat([p.detach().flatten() for n, p in parameters.items() if n.endswith(ending)]).std())


def test_pefts_gaussian_is_one_over_the_rank():
    """diffusers' DreamBooth-LoRA and TextBoost's code ask PEFT for it."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4000, 4))
    inject_adapter_in_model(LoraConfig(r=16, init_lora_weights="gaussian", target_modules=["0"]), network)
    theirs = float(network[0].lora_A["default"].weight.detach().std())
    assert theirs == pytest.approx(1 / 16, rel=0.02)


@pytest.mark.parametrize(
    ("method", "chosen", "expected"),
    [
        ("dreambooth_lora", dict(rank=16), 1 / 16),
        ("dreambooth_lora", dict(rank=16, train_text_encoder=True), 1 / 16),
        ("textboost", dict(variant="v1", rank=4), 1 / 4),
        ("personalized_residuals", dict(rank=16), 1 / 4),
    ],
)
def test_the_first_halves_spread(model, method, chosen, expected):
    found = trainable(model, method, class_word="mug", **chosen)
    assert spread(found, ".down") == pytest.approx(expected, rel=0.03)
    assert not any(p.any() for n, p in found.items() if n.endswith(".up"))


def test_without_a_spread_the_product_is_the_identity_in_the_mean():
    pair = fresh_pair(nn.Linear(3000, 8), 4, "zero_up", torch.Generator().manual_seed(0))
    gram = pair.down.detach() @ pair.down.detach().T / 3000
    torch.testing.assert_close(gram, torch.eye(4) / 4, rtol=0.1, atol=0.02)
