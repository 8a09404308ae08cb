"""The loss scale of float16: the loss is multiplied by it, and the optimizer divides the gradients by it again.

The mean over N values gives each a gradient of 2 error / N; where N is Stable Diffusion's 65,536, most gradients inside
the network lie below float16's smallest normal number, 6e-5, and lose their digits or vanish.
"""

from __future__ import annotations

# The values of a batch of SD1.5 (4 x 4 x 64 x 64): the gradient of each is then 2 error, as that of a sum.
START = 2.0**16
MOST = 2.0**24  # 256 times SD1.5's values are SDXL's at a batch of 256: more only overflows
# Good steps until the scale is tried at twice its size: that costs a step where it was too large, so at most one in
# 200; runs have 100 to 1000 steps.
GROW_EVERY = 200


class LossScale:
    """A scale that is halved where a gradient overflows, and doubled after `GROW_EVERY` steps without.

    Args:
        value: the first scale.
    """

    def __init__(self, value: float = START) -> None:
        self.value = value
        self.good_steps = 0  # since the last change

    def fitted(self) -> None:
        """Count a step whose gradients were finite."""
        self.good_steps += 1
        if self.good_steps == GROW_EVERY:
            self.value, self.good_steps = min(2 * self.value, MOST), 0

    def overflowed(self) -> bool:
        """Halve the scale; False where it is 1 already, so that the scale is not what made a gradient infinite."""
        self.good_steps = 0
        if self.value <= 1:
            return False
        self.value /= 2
        return True

    def state_dict(self) -> dict[str, float]:
        """The scale, and the steps since it changed."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved scale."""
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
