"""An autoencoder in bands of rows: diffusers' own numbers, in less memory."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import AutoencoderKL
from pcs_trainer.memory.autoencoder import autoencoder
from pcs_trainer.model import bands

SMALL = dict(
    block_out_channels=[16, 16, 32, 32],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    latent_channels=4,
    norm_num_groups=8,
    layers_per_block=2,
)
SDXL = SMALL | dict(block_out_channels=[128, 256, 512, 512], norm_num_groups=32)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    made = AutoencoderKL(**SMALL).eval().requires_grad_(False)
    for module in made.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.uniform_(0.2, 1), module.bias.normal_(0, 0.1)
    return made


@pytest.fixture
def small(monkeypatch):
    """Bands of a few rows, for pictures of a few positions."""
    monkeypatch.setattr(bands, "WHOLE", 100)
    monkeypatch.setattr(bands, "BAND", 300)


@torch.no_grad()
@pytest.mark.parametrize("order", (torch.contiguous_format, torch.channels_last), ids=("rows", "channels last"))
@pytest.mark.parametrize("shape", ((1, 3, 64, 64), (2, 3, 72, 40), (1, 3, 40, 104)), ids=str)
def test_bands_give_diffusers_numbers(vae, small, monkeypatch, shape, order):
    net = vae.to(memory_format=order)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    before = net.encode(x).latent_dist
    wanted = net.decode(before.mean).sample
    given, worked = x.clone(), []
    monkeypatch.setattr(
        bands, "_conv", lambda conv, part, own=bands._conv: worked.append(part.shape) or own(conv, part)
    )
    with bands.in_bands(net, 10**6):
        found, drawn = net.encode(x).latent_dist, net.decode(before.mean).sample
    assert torch.equal(x, given) and len(worked) > 60
    torch.testing.assert_close(found.mean, before.mean, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found.std, before.std, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(drawn, wanted, rtol=1e-4, atol=2e-5)
    assert torch.equal(net.encode(x).latent_dist.mean, before.mean)  # and leave nothing behind


@torch.no_grad()
def test_moments_of_bands_are_those_of_the_whole():
    """Far from zero, where a difference of squares would have lost them."""
    x = torch.randn(2, 16, 50, 30) * 0.1 + 300
    norm = torch.nn.GroupNorm(4, 16, eps=1e-6)
    norm.weight.uniform_(0.2, 1)
    scale, shift = bands.scale_and_shift(x, norm)
    torch.testing.assert_close(x.double() * scale + shift, norm.double()(x.double()), rtol=1e-3, atol=1e-2)


def test_small_pictures_and_gradients_are_worked_on_whole(vae, monkeypatch):
    monkeypatch.setattr(bands, "_convolved", None)
    x = torch.randn(1, 3, 64, 64)
    with bands.in_bands(vae, 10**6):
        assert torch.isfinite(vae.encode(x).latent_dist.mean).all()
        monkeypatch.setattr(bands, "WHOLE", 0)
        x.requires_grad_(True)
        vae.encode(x).latent_dist.mean.sum().backward()
    assert x.grad.abs().sum() > 0


def test_sdxls_picture_takes_less_than_half():
    wide = autoencoder(json.dumps(SDXL), torch.float32)
    assert wide.encoding(1, 1024) < 1.3e9  # whole: 2.7
    assert wide.encoding(1, 512) > 0.6e9  # whole


@torch.no_grad()
def test_an_autoencoder_that_others_have_changed_works_whole(vae, small):
    x, net = torch.randn(1, 3, 64, 64), copy.deepcopy(vae)
    for change in (
        lambda m: setattr(m.encoder.conv_in, "padding_mode", "circular"),
        lambda m: m.encoder.mid_block.resnets[0].register_forward_hook(lambda *_: None),
        lambda m: setattr(m.decoder.up_blocks[0].resnets[0], "forward", m.decoder.up_blocks[0].resnets[0].forward),
    ):
        other = copy.deepcopy(net)
        change(other)
        before = [module.__dict__.get("forward") for module in other.modules()]
        wanted = other.encode(x).latent_dist.mean
        with bands.in_bands(other, 10**6):
            assert torch.equal(other.encode(x).latent_dist.mean, wanted)
        assert [module.__dict__.get("forward") for module in other.modules()] == before


@torch.no_grad()
def test_threads_and_contexts_inside_each_other(vae, small):
    x = torch.randn(1, 3, 64, 64)

    def encoded(_):
        with torch.no_grad(), bands.in_bands(vae, 10**6), bands.in_bands(vae, 10**6):
            return vae.encode(x).latent_dist.mean

    wanted = encoded(0)
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(found, wanted) for found in pool.map(encoded, range(20)))
    assert not any("forward" in module.__dict__ for module in vae.modules())
