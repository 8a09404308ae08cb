"""AdamW with 8-bit states in pure torch.

g = grad_scale grad;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
p -= lr sqrt(1 - b2^t) / (1 - b1^t)  m / (sqrt(v) + eps sqrt(1 - b2^t)),  p *= 1 - lr weight_decay before or after.

m and v are decoded with their blocks' absmax, updated in float32, used as they are, and coded again. The numbers come
as a row (row.py) on the parameter's device; where the step is refused, every tensor keeps its values.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from .codes import decode, encode

SMALLEST_NORMAL = 113  # the float32 exponent, with its bias of 127, of float16's 2^-14: below it the unit stays 2^-24


@overload
def hash32(x: Tensor) -> Tensor: ...
@overload
def hash32(x: int) -> int: ...
def hash32(x: Tensor | int) -> Tensor | int:
    """A 32-bit integer mixer (xor-shift-multiply); an int64 tensor, or a Python number, holds the unsigned values."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def step_key(seed: int, step: int, device: torch.device) -> Tensor:
    """hash32(step ^ hash32(seed)): what a step's random bits depend on."""
    return torch.tensor(hash32(hash32(seed & 0xFFFFFFFF) ^ (step & 0xFFFFFFFF)), device=device)  # []


def random_bits(key: Tensor, n: int) -> Tensor:
    """16 bits for each of n elements: hash32(low(i) ^ hash32(high(i) ^ key)) & 0xFFFF."""
    i = torch.arange(n, dtype=torch.int64, device=key.device)  # [n]
    return hash32((i & 0xFFFFFFFF) ^ hash32((i >> 32) ^ key)) & 0xFFFF  # [n]


def round_stochastically(values: Tensor, key: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """float32 -> bfloat16 or float16, up with the probability of the remainder; inf and NaN stay."""
    random = random_bits(key, values.numel())  # [n]
    drawn = (_to_float16 if dtype == torch.float16 else _to_bfloat16)(values, random)  # [n]
    return torch.where(values.isfinite(), drawn, values).to(dtype)  # [n]


def _to_bfloat16(values: Tensor, random: Tensor) -> Tensor:
    """The float32 [n] whose low half is 0."""
    bits = values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF  # [n]
    bits = (bits + random) & 0xFFFF0000  # [n]
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)  # [n]


def _to_float16(values: Tensor, random: Tensor) -> Tensor:
    """The float32 [n] that float16 holds: a multiple of 2^-10 of the value's power of two, at least of 2^-24.

    Units are powers of two, made and inverted in the exponent's bits (at 23): dividing by them is exact.
    """
    power = (values.view(torch.int32) & 0x7F800000).clamp_min(SMALLEST_NORMAL << 23)  # [n]
    unit = power - (10 << 23)  # [n]
    scaled = values.abs() * ((254 << 23) - unit).view(torch.float32)  # [n]
    whole = scaled.floor()  # [n]
    whole = whole + (random.float() < (scaled - whole) * 65536)  # [n]
    return torch.copysign(whole * unit.view(torch.float32), values)  # [n]


class Numbers:
    """A row's columns, each a tensor without dimensions."""

    def __init__(self, row: Tensor, finite: Tensor | None) -> None:
        self.beta1, self.beta2, self.rest1, self.rest2, self.size, self.eps, *others = row[:10].unbind()
        self.before, self.after, self.scale, taken = others
        bits = row[10:].view(torch.int32)
        self.key = bits[0].to(torch.int64) & 0xFFFFFFFF
        self.count = bits[1]
        self.taken = taken != 0 if finite is None else (taken != 0) & finite.reshape(())

    def moments(self, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        g = g.float() * self.scale
        return self.beta1 * m + self.rest1 * g, self.beta2 * v + self.rest2 * g * g

    def parameter(self, p: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return (p.float() * self.before - self.size * (m / (v.sqrt() + self.eps))) * self.after

    def write(self, target: Tensor, new: Tensor) -> None:
        """Store new values, unless the step is refused."""
        target.copy_(torch.where(self.taken, new.view(target.shape).to(target.dtype), target))

    def write_param(self, param: Tensor, new: Tensor, stochastic: bool) -> None:
        """Store the new values [n], rounded stochastically where that is asked for and param has 16 bits."""
        if stochastic and param.dtype in (torch.bfloat16, torch.float16):
            new = round_stochastically(new, self.key, param.dtype)
        self.write(param, new)


def step_8bit(
    param: Tensor,
    grad: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    qmap1: Tensor,
    qmap2: Tensor,
    row: Tensor,
    finite: Tensor | None,
    block_size: int,
    stochastic: bool,
) -> None:
    numbers = Numbers(row, finite)
    before = decode(state1, absmax1, qmap1, block_size), decode(state2, absmax2, qmap2, block_size)
    m, v = numbers.moments(grad.flatten(), *before)  # [n]
    numbers.write_param(param, numbers.parameter(param.flatten(), m, v), stochastic)
    for values, state, absmax, qmap in ((m, state1, absmax1, qmap1), (v, state2, absmax2, qmap2)):
        codes, scale = encode(values, qmap, block_size)  # [n], [blocks]
        numbers.write(state, codes)
        numbers.write(absmax, scale)
    numbers.count += numbers.taken


def step_32bit(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row: Tensor,
    finite: Tensor | None,
    stochastic: bool,
) -> None:
    numbers = Numbers(row, finite)
    m, v = numbers.moments(grad, exp_avg, exp_avg_sq)  # param.shape
    numbers.write_param(param, numbers.parameter(param, m, v).flatten(), stochastic)
    numbers.write(exp_avg, m)
    numbers.write(exp_avg_sq, v)
    numbers.count += numbers.taken
