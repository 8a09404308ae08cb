"""The arithmetic of the training losses.

Letters: B pictures, C latent channels, h x w latent size, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.schedule import Schedule


def picture_losses(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error of each picture [B]; with a mask [B, 1, h, w] the mean over what it covers, channels counted."""
    error = (prediction.float() - target.float()).pow(2)
    if mask is None:
        return error.flatten(1).mean(1)
    mask = mask.expand_as(error)
    return (mask * error).flatten(1).sum(1) / mask.flatten(1).sum(1)


def snr_weights(schedule: Schedule, t: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR for noise prediction, / (SNR + 1) for velocity (arXiv 2303.09556) [B]."""
    snr = schedule.snr(t)
    clipped = snr.clamp_max(gamma)
    return clipped / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[schedule.prediction]


def snr_law(schedule: Schedule) -> Tensor:
    """TextBoost's p(t), proportional to max log SNR - log SNR(t) [steps]."""
    log_snr = schedule.snr().double().clamp_min(1e-20).log()
    weights = log_snr.max() - log_snr
    return weights / weights.sum()


def drawn_timesteps(schedule: Schedule, law: str, count: int, generator: torch.Generator) -> Tensor:
    """Random timesteps [count]: uniform, or by `snr_law` where law is "snr"."""
    if law == "snr":
        return torch.multinomial(snr_law(schedule), count, replacement=True, generator=generator)
    return torch.randint(len(schedule), (count,), generator=generator)
