"""Samplers as plain functions: from noise to clean latents by a few evaluations of the network.

All take the same arguments:
    predict    predict(x, t): the network's output for noisy x [B, C, H, W] at timestep t
    schedule   the noise schedule; its configuration decides the timesteps, the last noise level and the clipping, by
               the rules and defaults of diffusers' scheduler of that name
    steps      how many
    noise      unit noise [B, C, H, W]
    generator  one, or one per image, for the noise that is added on the way
    on_step    on_step(step, steps, x), called after step 0, 1, ...; returning False stops there
and return clean latents [B, C, H, W].

Letters: B images, C latent channels, abar the share of signal, sigma = sqrt((1 - abar) / abar), lambda = -log sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.schedule import Schedule
from .names import NAMES

Predict = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, int, Tensor], object] | None
Random = torch.Generator | Sequence[torch.Generator] | None
Sampler = Callable[..., Tensor]

# Options that change the arithmetic in diffusers, with the values that are supported here.
_ONLY: dict[str, tuple[Any, ...]] = {
    "thresholding": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "algorithm_type": ("dpmsolver++", "deis"),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
}


def unit_noise(shape: Sequence[int], generator: Random, like: Tensor | None = None) -> Tensor:
    """Unit noise in fp32, or in the dtype and on the device of `like`.

    Args:
        shape: of the noise, [B, ...].
        generator: one for all, or one per image, so that an image's noise does not depend on its batch.
        like: a tensor whose dtype and device the noise gets.
    """

    def one(shape: Sequence[int], g: torch.Generator | None) -> Tensor:
        return torch.randn(tuple(shape), generator=g, device="cpu" if g is None else g.device)

    if generator is None or isinstance(generator, torch.Generator):
        noise = one(shape, generator)
    else:
        noise = torch.cat([one((1, *shape[1:]), g) for g in generator])
    return noise if like is None else noise.to(like)


def _checked(schedule: Schedule, steps: int) -> dict[str, Any]:
    """The schedule's configuration; ValueError names what is not supported."""
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"steps must be from 1 to {len(schedule)}, the steps of this model's schedule, not {steps}")
    for key, allowed in _ONLY.items():
        value = schedule.config.get(key)
        if value is not None and value not in allowed:
            known = " or ".join(repr(a) for a in allowed)
            raise ValueError(f"schedule: {key} = {value!r} is not supported in sampling; supported: {known}")
    return schedule.config


def _spaced(config: dict[str, Any], last: int, count: int, spacing: str, total: int) -> np.ndarray:
    """`count` timesteps below `last`, in descending order; linspace ones are not rounded yet."""
    if spacing == "linspace":
        return np.linspace(0, last - 1, count)[::-1]
    if spacing == "leading":
        return (np.arange(count) * (last // count))[::-1].astype(float) + config.get("steps_offset", 0)
    return np.arange(last, 0, -total / count).round()[:count] - 1


def _sigmas(schedule: Schedule) -> np.ndarray:
    """sigma of every timestep of training; a schedule that ends in pure noise ends just before it."""
    abar = schedule.abar.cpu().clone()
    if schedule.config.get("rescale_betas_zero_snr"):
        abar[-1] = 2**-24  # as in diffusers, where sigma would be infinite
    return (((1 - abar) / abar) ** 0.5).numpy()


def _karras(largest: float, smallest: float, count: int) -> np.ndarray:
    """Karras et al. (arXiv 2206.00364), equation 5."""
    rho = 7.0  # the paper's value
    return np.linspace(largest ** (1 / rho), smallest ** (1 / rho), count) ** rho


def _times_of(sigmas: np.ndarray, every: np.ndarray) -> np.ndarray:
    """The timesteps at which the schedule has these sigmas, interpolated in log sigma."""
    # 1e-10 is diffusers' floor, for a last sigma of 0
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(every), np.arange(len(every)))


def _last_sigma(config: dict[str, Any], every: np.ndarray) -> float:
    """The noise level after the last step."""
    return float(every[0]) if config.get("final_sigmas_type", "zero") == "sigma_min" else 0.0


def _goes_on(on_step: OnStep, step: int, steps: int, x: Tensor) -> bool:
    """Call on_step; whether another step follows."""
    return on_step is None or on_step(step, steps, x) is not False


def ddim(
    predict: Predict,
    schedule: Schedule,
    steps: int,
    noise: Tensor,
    generator: Random = None,
    on_step: OnStep = None,
    eta: float = 0.0,
) -> Tensor:
    """Denoising diffusion implicit models (Song et al., arXiv 2010.02502), equation 12; eta 1 is DDPM."""
    config, total = _checked(schedule, steps), len(schedule)
    times = _spaced(config, total, steps, config.get("timestep_spacing") or "leading", total).round().astype(int)
    abar = schedule.abar.double().cpu()
    end = 1.0 if config.get("set_alpha_to_one", True) else float(abar[0])
    # diffusers' scheduler clips where its file says nothing, as for pixels; its latent pipelines turn that off. A file
    # of another scheduler says nothing of it, and latents go well beyond 1.
    clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample", False) else None
    x = noise
    for step, t in enumerate(times.tolist()):
        before = t - total // steps
        a, b = float(abar[t]), float(abar[before]) if before >= 0 else end
        says = predict(x, t)
        when = torch.full((len(x),), t)
        clean, eps = schedule.clean(x, says, when), _noise_in(x, says, a, schedule.prediction)
        if clip is not None:
            clean = clean.clamp(-clip, clip)
        spread = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        x = math.sqrt(b) * clean + math.sqrt(max(1 - b - spread**2, 0.0)) * eps
        if eta > 0:
            x = x + spread * unit_noise(x.shape, generator, x)
        if not _goes_on(on_step, step, len(times), x):
            break
    return x


def _noise_in(x: Tensor, says: Tensor, abar: float, prediction: str) -> Tensor:
    """The noise in x at this share of signal, by what the network says."""
    if prediction == "epsilon":
        return says
    if prediction == "sample":
        return (x - math.sqrt(abar) * says) / math.sqrt(1 - abar)
    return math.sqrt(abar) * says + math.sqrt(1 - abar) * x


def dpmpp_2m(
    predict: Predict,
    schedule: Schedule,
    steps: int,
    noise: Tensor,
    generator: Random = None,  # noqa: ARG001  # one signature for all samplers; this one adds no noise
    on_step: OnStep = None,
) -> Tensor:
    """DPM-Solver++(2M), the second-order multistep solver for the data (Lu et al., arXiv 2211.01095), algorithm 2."""
    config = _checked(schedule, steps)
    times, sigmas = _dpm_times(schedule, config, steps)
    alphas = 1 / np.sqrt(sigmas**2 + 1)
    with np.errstate(divide="ignore"):
        lambdas = -np.log(sigmas)
    few = config.get("lower_order_final", True) and len(times) < 15  # diffusers' bound: second order is unstable there
    first_order_end = few or config.get("euler_at_final", False) or sigmas[-1] == 0
    x, older = noise, None
    for step, t in enumerate(times.tolist()):
        clean = _clean(x, predict(x, t), float(alphas[step]), float(sigmas[step]), schedule.prediction)
        h = lambdas[step + 1] - lambdas[step]
        guess = clean
        if older is not None and not (first_order_end and step == len(times) - 1):
            guess = clean + float(h / (lambdas[step] - lambdas[step - 1]) / 2) * (clean - older)
        ratio = float(sigmas[step + 1] * alphas[step + 1] / (sigmas[step] * alphas[step]))
        x = ratio * x - float(alphas[step + 1] * np.expm1(-h)) * guess
        older = clean
        if not _goes_on(on_step, step, len(times), x):
            break
    return x


def _clean(x: Tensor, says: Tensor, alpha: float, sigma: float, prediction: str) -> Tensor:
    """The clean latents behind x = alpha (clean + sigma noise), by what the network says."""
    if prediction == "epsilon":
        return x / alpha - sigma * says
    return says if prediction == "sample" else alpha * (x - sigma * says)


def _dpm_times(schedule: Schedule, config: dict[str, Any], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps, sigmas with the last one)"""
    every, total = _sigmas(schedule), len(schedule)
    least = config.get("lambda_min_clipped")
    last = total if least is None else int((-np.log(every) >= float(least)).sum())
    spacing = config.get("timestep_spacing") or "linspace"
    count = steps if spacing == "trailing" else steps + 1
    times = _spaced(config, last, count, spacing, total).round()[:steps]
    sigmas = every[times.astype(int)]
    if config.get("use_karras_sigmas"):
        sigmas = _karras(float(every[-1]), float(every[0]), steps)
        times = _times_of(sigmas, every).round()
    return times.astype(int), np.append(sigmas, _last_sigma(config, every)).astype(np.float64)


def _euler_times(schedule: Schedule, config: dict[str, Any], steps: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(timesteps, which may lie between those of training; sigmas; the scale of the initial noise)"""
    every, total = _sigmas(schedule), len(schedule)
    spacing = config.get("timestep_spacing") or "linspace"
    times = _spaced(config, total, steps, spacing, total)
    sigmas = np.interp(times, np.arange(total), every)
    return times, sigmas, _noise_scale(config, sigmas)


def _noise_scale(config: dict[str, Any], sigmas: np.ndarray) -> float:
    """The deviation of the initial latents, as diffusers' Euler schedulers have it."""
    leading = config.get("timestep_spacing") == "leading"
    return float(np.sqrt(sigmas.max() ** 2 + 1) if leading else sigmas.max())


def _slope(predict: Predict, x: Tensor, t: float, sigma: float, prediction: str) -> Tensor:
    """dx / dsigma of x = clean + sigma noise, which is the noise."""
    alpha = 1 / math.sqrt(sigma**2 + 1)
    clean = _clean(alpha * x, predict(alpha * x, t), alpha, sigma, prediction)
    return (x - clean) / sigma


def euler(
    predict: Predict,
    schedule: Schedule,
    steps: int,
    noise: Tensor,
    generator: Random = None,  # noqa: ARG001  # one signature for all samplers; this one adds no noise
    on_step: OnStep = None,
) -> Tensor:
    """Euler's method on the probability-flow equation (Karras et al., arXiv 2206.00364), algorithm 2 without churn."""
    config = _checked(schedule, steps)
    times, sigmas, scale = _euler_times(schedule, config, steps)
    every = _sigmas(schedule)
    if config.get("use_karras_sigmas"):
        largest, smallest = config.get("sigma_max"), config.get("sigma_min")
        sigmas = _karras(largest or float(sigmas[0]), smallest or float(sigmas[-1]), steps)
        times = _times_of(sigmas, every)
        scale = _noise_scale(config, sigmas)
    sigmas = np.append(sigmas, _last_sigma(config, every))
    x = scale * noise
    for step, (now, after) in enumerate(pairwise(sigmas.tolist())):
        x = x + (after - now) * _slope(predict, x, float(times[step]), now, schedule.prediction)
        if not _goes_on(on_step, step, len(times), x):
            break
    return x


def euler_ancestral(
    predict: Predict,
    schedule: Schedule,
    steps: int,
    noise: Tensor,
    generator: Random = None,
    on_step: OnStep = None,
) -> Tensor:
    """Euler's method to a lower noise level, then fresh noise up to the next: DDPM's (arXiv 2006.11239) variance."""
    config = _checked(schedule, steps)
    times, sigmas, scale = _euler_times(schedule, config, steps)
    x = scale * noise
    for step, (now, after) in enumerate(pairwise([*sigmas.tolist(), 0.0])):
        up = after * math.sqrt(max(now**2 - after**2, 0.0)) / now
        down = math.sqrt(max(after**2 - up**2, 0.0))
        x = x + (down - now) * _slope(predict, x, float(times[step]), now, schedule.prediction)
        x = x + up * unit_noise(x.shape, generator, x)
        if not _goes_on(on_step, step, len(times), x):
            break
    return x


SAMPLERS: dict[str, Sampler] = {name: globals()[name] for name in NAMES}  # each is the function of that name
