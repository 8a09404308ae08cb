"""The numbers of every parameter's next step on one device, made there from the counts of steps: the host never waits.

What the host knows, the groups' rates, betas and decays, comes through a small buffer that `fill` writes where one of
them changed. A CUDA graph that holds `compute` replays with whatever the buffer holds then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.adamw8bit.reference import hash32
from ..ops.adamw8bit.row import BETA1, COUNT, EPS, KEY, MASK32, SCALE, SIZE, TAKEN, WIDTH, seed_hash

# Where the corrections are computed in float64, as on the host: elsewhere (Apple's GPUs, many of Intel's) there is
# none, and float32 gives them to a few units in the last place, without 1 - beta^t's cancellation.
HAS_FLOAT64 = ("cpu", "cuda", "meta")
PRIME = 1_000_003  # above any number of parameters: no two pairs of seed and parameter draw the same bits


class StepNumbers:
    """Rows of numbers (ops/adamw8bit/row.py) of the parameters on one device.

    Args:
        device: theirs.
        groups: the parameter group of each, by its place among the optimizer's groups.
        places: of each among all parameters: it draws its own random bits.
        seed: of the random bits; None: there are none.
        decay_first: whether the weight decay comes before the update.
    """

    def __init__(
        self,
        device: torch.device,
        groups: Sequence[int],
        places: Sequence[int],
        seed: int | None,
        decay_first: bool,
    ) -> None:
        self.decay_first = decay_first
        self.seed = seed
        wide = torch.float64 if device.type in HAS_FLOAT64 else torch.float32
        self.bits = torch.zeros(len(groups), WIDTH, dtype=torch.int32, device=device)
        self.floats = self.bits.view(torch.float32)  # the same memory
        self.counts = self.bits[:, COUNT]  # of the steps taken
        self.rows = list(self.floats.unbind())
        self._group = torch.tensor(groups, dtype=torch.int64).to(device)  # [P]
        hashes = [seed_hash(None if seed is None else seed * PRIME + place) for place in places]
        self._seeds = torch.tensor(hashes, dtype=torch.int64).to(device)  # [P]
        self._settings = torch.zeros(max(groups) + 1, 10, dtype=wide, device=device)
        self._filled: list[tuple[float, ...]] | None = None
        self._made_for: tuple[bool, float | Tensor, int | None] | None = None
        self._used: set[int] = set()  # rows whose step was taken, or refused, since they were made

    def take_counts(self, places: Mapping[int, tuple[StepNumbers, int]]) -> None:
        """Go on from counts that other numbers hold: {row: (the other numbers, the row there)}."""
        for other in dict.fromkeys(numbers for numbers, _ in places.values()):
            rows = {i: row for i, (numbers, row) in places.items() if numbers is other}
            here, there = torch.tensor(list(rows)), torch.tensor(list(rows.values()))
            counts = other.counts[there.to(other.counts.device)]
            self.counts[here.to(self.counts.device)] = counts.to(self.counts.device)

    def used(self, i: int) -> bool:
        """Whether row i's step was taken, or refused, so that its next one begins a new step."""
        return i in self._used

    def fill(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Send the groups' numbers where one of them changed; never waits, and is not for a graph that is captured."""
        values = [self._of_group(group) for group in param_groups[: len(self._settings)]]
        if values == self._filled:
            return
        self._made_for = None
        sent = torch.tensor(values, dtype=self._settings.dtype)
        # A new pinned tensor each time: the copy of the one before may still be under way.
        # torch keeps its memory until that is done.
        sent = sent.pin_memory() if self._settings.device.type == "cuda" else sent
        self._settings.copy_(sent, non_blocking=True)
        self._filled = values

    def _of_group(self, group: dict[str, Any]) -> tuple[float, ...]:
        """beta1, beta2, 1 - beta1, 1 - beta2, lr, eps, decay before and after, and the logarithms of the betas."""
        # Numbers, not the tensors that a group may hold: one changed in place would equal itself, and not be sent.
        beta1, beta2 = (float(beta) for beta in group["betas"][:2])
        rate = float(group["lr"])
        decay = 1 - rate * group["weight_decay"]
        before, after = (decay, 1.0) if self.decay_first else (1.0, decay)
        logs = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
        return (beta1, beta2, 1 - beta1, 1 - beta2, rate, group["eps"], before, after, *logs)

    def row_for(self, i: int, grad_scale: float | Tensor) -> Tensor:
        """The row of one parameter's next step; all rows are made together where this one is used up.

        Args:
            i: the parameter's number on this device.
            grad_scale: as in `compute`; a tensor is known by itself and its version.
        """
        version = grad_scale._version if isinstance(grad_scale, Tensor) else None
        during, known, its_version = self._made_for or (None, None, None)
        same = known is grad_scale or (version is None and not isinstance(known, Tensor) and known == grad_scale)
        same = same and during is capturing() and its_version == version
        if i in self._used or not same:
            self.compute(grad_scale, None)
            self._made_for = capturing(), grad_scale, version
        self._used.add(i)
        return self.rows[i]

    def compute(self, grad_scale: float | Tensor, finite: Tensor | None) -> None:
        """Write every row for the step that follows the ones counted.

        Args:
            grad_scale: multiplies the gradients; where it is a tensor that is not finite, the step is refused.
            finite: a bool; where it is False, the step is refused.
        """
        self._made_for = None
        self._used.clear()
        step = self.counts + 1  # [P]
        numbers = self._settings.index_select(0, self._group)  # [P, 10]
        left = -torch.expm1(step[:, None] * numbers[:, 8:])  # [P, 2]: 1 - beta^step
        correction2 = left[:, 1].sqrt()
        numbers[:, SIZE].mul_(correction2).div_(left[:, 0])
        numbers[:, EPS].mul_(correction2)
        self.floats[:, BETA1:SCALE].copy_(numbers[:, :8])
        if isinstance(grad_scale, Tensor):
            scale = grad_scale.detach().to(self.bits.device, non_blocking=True).reshape(())
            self.floats[:, SCALE].copy_(scale)
            taken: Tensor | None = scale.abs() < math.inf
        else:
            self.floats[:, SCALE].fill_(grad_scale)
            taken = None
        if finite is not None:
            finite = finite.to(self.bits.device, non_blocking=True).reshape(())
            taken = finite if taken is None else taken & finite
        if taken is None:
            self.floats[:, TAKEN].fill_(1.0)
        else:
            self.floats[:, TAKEN].copy_(taken)
        if self.seed is not None:
            self.bits[:, KEY].copy_(hash32(self._seeds ^ (step.to(torch.int64) & MASK32)))


def capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing of the host may be read then."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
