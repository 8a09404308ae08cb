"""The noise schedule a model was trained with, from diffusers' scheduler_config.json.

abar[t] is the share of signal left at timestep t:  x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise.  Letters: B images.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def _betas(config: dict[str, Any], steps: int) -> Tensor:
    """The noise added at each step, in fp32 by the operations diffusers uses."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    kind = config.get("beta_schedule", "linear")
    first, last = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if kind == "linear":
        return torch.linspace(first, last, steps, dtype=torch.float32)
    if kind == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":
        left = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        # 0.008 and 0.999 are of the cosine schedule's paper (arXiv 2102.09672)
        return torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(left)], dtype=torch.float32)
    raise ValueError(
        f"schedule: beta_schedule = {kind!r} is not supported; supported: linear, scaled_linear, squaredcos_cap_v2"
    )


def _without_signal_at_the_end(betas: Tensor) -> Tensor:
    """Betas whose last step is pure noise (zero terminal SNR, arXiv 2305.08891, algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    abar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


@dataclass
class Schedule:
    """abar [steps] in fp32, and what the network predicts: epsilon, v_prediction or sample."""

    abar: Tensor
    prediction: str = "epsilon"
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: dict[str, Any] | str | Path) -> Schedule:
        """The schedule of diffusers' scheduler_config.json or its contents; ValueError names an unsupported value."""
        values: dict[str, Any] = config if isinstance(config, dict) else json.loads(Path(config).read_text())
        prediction = values.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            known = ", ".join(PREDICTIONS)
            raise ValueError(f"schedule: prediction_type = {prediction!r} is not supported; supported: {known}")
        betas = _betas(values, int(values.get("num_train_timesteps", 1000)))
        if values.get("rescale_betas_zero_snr"):
            betas = _without_signal_at_the_end(betas)
        return cls((1.0 - betas).cumprod(0), prediction, dict(values))

    def __len__(self) -> int:
        return len(self.abar)

    def on(self, device: torch.device) -> Schedule:
        """The same with its table on a device, so that no step copies it there."""
        return replace(self, abar=self.abar.to(device))

    def roots(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar) at t [B], in fp32, shaped to multiply `like` [B, ...]."""
        abar = self.abar.to(like.device)[t.to(like.device)].reshape(-1, *[1] * (like.dim() - 1))
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy x [B, ...] at timesteps t [B], in x's dtype."""
        signal, sigma = self.roots(t, x)
        return (signal * x + sigma * noise).to(x.dtype)

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict at t [B] for the clean x [B, ...] and this noise."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x
        signal, sigma = self.roots(t, x)
        return (signal * noise - sigma * x).to(x.dtype)

    def clean(self, x: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latents that a prediction for noisy x [B, ...] at t [B] stands for."""
        signal, sigma = self.roots(t, x)
        if self.prediction == "epsilon":
            return (x - sigma * prediction) / signal
        if self.prediction == "sample":
            return prediction
        return signal * x - sigma * prediction

    def snr(self, t: Tensor | None = None) -> Tensor:
        """abar / (1 - abar) at t, on t's device; without t at every step."""
        abar = self.abar if t is None else self.abar.to(t.device)[t]
        return abar / (1 - abar)
