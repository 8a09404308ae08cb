"""One step's numbers of one parameter: a row of float32 on its device, from which every implementation reads them.

    column   0      1      2          3          4          5              6       7      8           9      10   11
    number   beta1  beta2  1 - beta1  1 - beta2  step size  corrected eps  before  after  grad_scale  taken  key  count

`before` and `after` are 1 - lr weight_decay on that side of the update and 1 on the other; `taken` is 0 where the step
is refused. Key and count are 32-bit integers: their bits lie in the row. `count` is of the steps taken, and whoever
takes the step raises it: no host needs to know.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reference import hash32

BETA1, BETA2, REST1, REST2, SIZE, EPS, BEFORE, AFTER, SCALE, TAKEN, KEY, COUNT = range(12)
WIDTH = 12  # 48 bytes: every row of a table begins at a multiple of 16, so that one compiled kernel takes them all
MASK32 = 0xFFFFFFFF


def signed(x: int) -> int:
    """An unsigned 32-bit integer as the signed one of the same bits."""
    return x - 2**32 if x >= 2**31 else x


def seed_hash(seed: int | None) -> int:
    """The part of the key that no step changes."""
    return int(hash32((seed or 0) & MASK32))


def host_row(
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    seed: int | None,
    decay_first: bool,
) -> Tensor:
    """The row [12] of numbers that the host knows, on the CPU; `step` counts the one to be taken."""
    correction2 = math.sqrt(1 - beta2**step)
    size = lr * correction2 / (1 - beta1**step)
    decay = 1 - lr * weight_decay
    before, after = (decay, 1.0) if decay_first else (1.0, decay)
    numbers = beta1, beta2, 1 - beta1, 1 - beta2, size, eps * correction2, before, after, grad_scale, 1.0, 0.0, 0.0
    row = torch.tensor(numbers, dtype=torch.float32)
    bits = [signed(int(hash32(seed_hash(seed) ^ (step & MASK32)))), signed((step - 1) & MASK32)]
    row.view(torch.int32)[KEY:] = torch.tensor(bits, dtype=torch.int32)
    return row
