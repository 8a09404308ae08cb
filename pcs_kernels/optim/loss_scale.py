"""The loss scale of float16: the loss is multiplied by it, and the optimizer divides the gradients by it again.

The mean over N values gives each a gradient of 2 error / N; where N is Stable Diffusion's 65,536, most gradients inside
the network lie below float16's smallest normal number, 6e-5, and lose their digits or vanish.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The values of a batch of SD1.5 (4 x 4 x 64 x 64): the gradient of each is then 2 error, as that of a sum.
START = 2.0**16
MOST = 2.0**24  # 256 times SD1.5's values are SDXL's at a batch of 256: more only overflows
# Good steps until the scale is tried at twice its size: that costs a step where it was too large, so at most one in
# 200; runs have 100 to 1000 steps.
GROW_EVERY = 200


class LossScale:
    """A scale that is halved where a gradient overflows, and doubled after `GROW_EVERY` steps without.

    It lives on the device and follows what happens there: the host never has to know.

    Args:
        value: the first scale.
        device: of the gradients; None is the CPU.
    """

    def __init__(self, value: float = START, device: torch.device | None = None) -> None:
        self.value = torch.tensor(float(value), device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)  # since the last change

    @torch.no_grad()
    def follow(self, good: Tensor, overflowed: Tensor) -> None:
        """Count a step.

        Args:
            good: bool, its gradients were finite.
            overflowed: bool, a gradient was not while the loss was; a scale of 1 stays: it is not what was too large.
        """
        steps = torch.where(good, self.good_steps + 1, torch.where(overflowed, 0, self.good_steps))
        grows, falls = steps >= GROW_EVERY, overflowed & (self.value > 1)
        self.good_steps.copy_(torch.where(grows, 0, steps))
        larger = (2 * self.value).clamp_max(MOST)
        self.value.copy_(torch.where(grows, larger, torch.where(falls, self.value / 2, self.value)))

    def fitted(self) -> None:
        """Count a step whose gradients were finite."""
        yes = torch.ones_like(self.value, dtype=torch.bool)
        self.follow(yes, ~yes)

    def overflowed(self) -> bool:
        """Halve the scale; False where it is 1 already, so that the scale is not what made a gradient infinite."""
        yes, before = torch.ones_like(self.value, dtype=torch.bool), float(self.value)
        self.follow(~yes, yes)
        return before > 1

    def state_dict(self) -> dict[str, float]:
        """The scale, and the steps since it changed."""
        return {"value": float(self.value), "good_steps": int(self.good_steps)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved scale."""
        self.value.fill_(float(state["value"]))
        self.good_steps.fill_(int(state["good_steps"]))
