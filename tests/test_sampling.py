"""Samplers against diffusers' schedulers; sample(): batches, seeds, guidance, several concepts in one batch."""

from __future__ import annotations

import diffusers
import pytest
import torch
from pcs_trainer import samplers
from pcs_trainer.schedule import Schedule
from unet_families import SMALL, ours_like, peer, relative

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SCHEDULES = {
    "sd1": BETAS | {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
    "sd2": BETAS
    | {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "prediction_type": "v_prediction"},
    "tiny": BETAS
    | {"beta_end": 0.02, "timestep_spacing": "trailing", "steps_offset": 1, "set_alpha_to_one": True}
    | {"prediction_type": "v_prediction"},
    "linspace": BETAS | {"timestep_spacing": "linspace"},
    "each class's defaults": {"beta_schedule": "scaled_linear"},
    "zero terminal": BETAS | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    | {"prediction_type": "v_prediction"},
    "karras": BETAS | {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1},
    "last sigma": BETAS | {"final_sigmas_type": "sigma_min"},
}  # fmt: skip
PEERS = {
    "ddim": diffusers.DDIMScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(3)
    small = SMALL | {"layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 4}
    small |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    small |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    return ours_like(peer(small)).requires_grad_(False)


def predictor(unet):
    context = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(9))
    kv = unet.text_kv(context)
    return lambda x, t: unet(x, torch.as_tensor(t).expand(len(x)), kv)


def peer_latents(kind, config, predict, steps, noise, seed, **options):
    """diffusers' own loop."""
    scheduler = kind.from_config(config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    takes_generator = kind in (PEERS["ddim"], PEERS["euler_ancestral"])
    more = options | ({"generator": generator} if takes_generator else {})
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x, **more).prev_sample
    return x


@pytest.mark.parametrize("steps", [7, 16])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("name", list(PEERS))
@torch.no_grad()
def test_a_sampler_ends_where_diffusers_scheduler_does(unet, name, schedule, steps):
    config = SCHEDULES[schedule]
    if name == "euler_ancestral" and "use_karras_sigmas" in config:
        pytest.skip("diffusers' scheduler of that name has no such setting")
    predict, noise = predictor(unet), torch.randn(2, 4, 8, 8)
    for eta in (0.0, 0.7) if name == "ddim" else (None,):
        options = {} if eta is None else {"eta": eta}
        expected = peer_latents(PEERS[name], config, predict, steps, noise, 5, **options)
        generator = torch.Generator().manual_seed(5)
        sampler = samplers.SAMPLERS[name]
        actual = sampler(predict, Schedule.from_config(config), steps, noise, generator, **options)
        assert relative(expected, noise) > 0.1
        assert relative(actual, expected) < 1e-4
