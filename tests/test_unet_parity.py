"""Our UNet against diffusers', same weights: outputs, every gradient, the state dict both ways, bf16."""

from __future__ import annotations

import pytest
import torch
from pcs_trainer.unet.unet import UNet
from unet_families import FAMILIES, SD15_REAL, X4_REAL, inputs, ours_like, peer, peer_prediction, relative


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    """(config, diffusers' network, our network, inputs, diffusers' prediction, output gradient, text gradient)"""
    torch.manual_seed(0)
    config = FAMILIES[request.param]
    network = peer(config)
    unet = ours_like(network)
    x, t, context, added = inputs(config)
    text = context.clone().requires_grad_()
    expected = peer_prediction(network, x, t, text, added)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    return config, network, unet, (x, t, context, added), expected.detach(), gradient, text.grad


def test_prediction_and_every_gradient_are_the_peers(family):
    _, network, unet, (x, t, context, added), expected, gradient, text_gradient = family
    unet.set_plan("eager").requires_grad_(True).zero_grad()
    text = context.clone().requires_grad_()
    actual = unet(x, t, text, added)
    assert relative(actual, expected) < 1e-5
    actual.backward(gradient)
    assert relative(text.grad, text_gradient) < 1e-4
    theirs = dict(network.named_parameters())
    ours = dict(unet.named_parameters())
    assert ours.keys() == theirs.keys()
    worst = max((relative(p.grad, theirs[name].grad), name) for name, p in ours.items())
    assert worst[0] < 1e-4, worst


def test_state_dict_goes_both_ways(family):
    config, _, unet, call, expected, *_ = family
    from diffusers import UNet2DConditionModel

    other = UNet2DConditionModel(**config)
    other.load_state_dict(unet.state_dict(), strict=True)
    with torch.no_grad():
        assert relative(peer_prediction(other, *call), expected) < 1e-6
    back = UNet.from_config(config, device="meta")
    back.load_state_dict(other.state_dict(), strict=True, assign=True)
    with torch.no_grad():
        assert relative(back(*call), expected) < 1e-5


def test_bf16_errs_at_most_twice_what_the_peer_does(family):
    config, network, _, (x, t, context, added), expected, *_ = family
    low = peer(config)
    low.load_state_dict(network.state_dict())
    low = low.bfloat16()
    ours = ours_like(low).requires_grad_(False)
    added = {k: v.bfloat16() if v.is_floating_point() else v for k, v in added.items()}
    call = (x.bfloat16(), t, context.bfloat16(), added)
    with torch.no_grad():
        theirs, actual = peer_prediction(low, *call), ours(*call)
    assert actual.dtype is torch.bfloat16
    assert relative(actual, expected) <= 2 * relative(theirs, expected) + 1e-3


@pytest.mark.parametrize("plan", ["A", "C"])
def test_a_frozen_network_gives_the_peers_text_gradient(family, plan):
    _, _, unet, (x, t, context, added), expected, gradient, text_gradient = family
    unet.set_plan(plan).requires_grad_(False)
    text = context.clone().requires_grad_()
    actual = unet(x, t, text, added)
    actual.backward(gradient)
    assert relative(actual, expected) < 1e-5
    assert relative(text.grad, text_gradient) < 1e-4


def test_text_kv_once_equals_the_states(family):
    _, _, unet, (x, t, context, added), expected, *_ = family
    unet.requires_grad_(False)
    with torch.no_grad():
        kv = unet.text_kv(context)
        assert set(kv) >= set(unet.attention_names())
        assert 2 * len(kv) == len(unet.text_projections())
        assert torch.equal(unet(x, t, kv, added), unet(x, t, context, added))
        per_block = {name: context for name in unet.attention_names()}
        assert relative(unet(x, t, unet.text_kv(per_block), added), expected) < 1e-5


@pytest.mark.parametrize("size", [(8, 24), (10, 14), (9, 13)])
def test_any_size_of_picture(size):
    torch.manual_seed(0)
    network = peer(FAMILIES["sd1"])
    unet = ours_like(network).requires_grad_(False)
    x, t, context, _ = inputs(FAMILIES["sd1"])
    x = torch.randn(2, 4, *size)
    with torch.no_grad():
        assert relative(unet(x, t, context), peer_prediction(network, x, t, context, {})) < 1e-5


def test_the_public_up_scalers_shapes_are_the_peers():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        theirs = UNet2DConditionModel(**X4_REAL).state_dict()
    ours = UNet.from_config(X4_REAL, device="meta").state_dict()
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    assert sum(p.numel() for p in ours.values()) == 473_398_020


@pytest.mark.slow
def test_the_full_sd15_configuration():
    torch.manual_seed(0)
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(**SD15_REAL)
    network = network.to_empty(device="cpu").requires_grad_(False)
    noise = torch.randn(max(p.numel() for p in network.parameters()))
    for name, p in network.named_parameters():
        scale = 0.02 if p.dim() == 1 else p[0].numel() ** -0.5
        p.copy_(noise[: p.numel()].view_as(p) * scale + float("norm" in name and "weight" in name))
    unet = UNet.from_config(dict(network.config), device="meta")
    unet.load_state_dict(network.state_dict(), strict=True, assign=True)
    unet.requires_grad_(False)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 768)
    with torch.no_grad():
        expected = network(x, 500, context).sample
        assert relative(unet(x, 500, context), expected) < 1e-5
