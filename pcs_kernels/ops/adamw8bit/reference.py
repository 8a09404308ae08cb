"""AdamW with 8-bit states in pure torch.

g = grad_scale grad;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
p -= lr sqrt(1 - b2^t) / (1 - b1^t)  m / (sqrt(v) + eps sqrt(1 - b2^t)),  p *= 1 - lr weight_decay before or after.

m and v are decoded with their blocks' absmax, updated in float32, used as they are, and coded again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .codes import decode, encode

SMALLEST_NORMAL = 113  # the float32 exponent, with its bias of 127, of float16's 2^-14: below it the unit stays 2^-24


def hash32(x: Tensor) -> Tensor:
    """A 32-bit integer mixer (xor-shift-multiply); int64 tensors hold the unsigned values."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def random_bits(seed: int, step: int, n: int, device: torch.device) -> Tensor:
    """16 bits for each of n elements: hash32(low(i) ^ hash32(high(i) ^ hash32(step ^ hash32(seed)))) & 0xFFFF."""
    i = torch.arange(n, dtype=torch.int64, device=device)  # [n]
    key = hash32(torch.tensor(seed & 0xFFFFFFFF, device=device))  # []
    key = hash32(key ^ (step & 0xFFFFFFFF))  # []
    return hash32((i & 0xFFFFFFFF) ^ hash32((i >> 32) ^ key)) & 0xFFFF  # [n]


def round_stochastically(values: Tensor, seed: int, step: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """float32 -> bfloat16 or float16, up with the probability of the remainder; inf and NaN stay."""
    random = random_bits(seed, step, values.numel(), values.device)  # [n]
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


def adamw(
    p: Tensor, m: Tensor, v: Tensor, lr: float, beta1: float, beta2: float, eps: float, decay: float, step: int
) -> Tensor:
    """The new float32 parameter; `decay` is the weight decay to apply before the update."""
    correction2 = math.sqrt(1 - beta2**step)
    size = lr * correction2 / (1 - beta1**step)
    return p * (1 - lr * decay) - size * (m / (v.sqrt() + eps * correction2))


def write(param: Tensor, new: Tensor, seed: int | None, step: int) -> None:
    """Store the new values [n], rounded stochastically where param has 16 bits and a seed is given."""
    if seed is not None and param.dtype in (torch.bfloat16, torch.float16):
        new = round_stochastically(new, seed, step, param.dtype)
    param.copy_(new.view(param.shape))


def step_8bit(
    param: Tensor,
    grad: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    qmap1: Tensor,
    qmap2: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    block_size: int,
    grad_scale: float,
    seed: int | None,
    decay_first: bool,
) -> None:
    g = grad.flatten().float() * grad_scale  # [n]
    m = beta1 * decode(state1, absmax1, qmap1, block_size) + (1 - beta1) * g  # [n]
    v = beta2 * decode(state2, absmax2, qmap2, block_size) + (1 - beta2) * g * g  # [n]
    decay = weight_decay if decay_first else 0.0
    new = adamw(param.flatten().float(), m, v, lr, beta1, beta2, eps, decay, step)  # [n]
    if not decay_first:
        new = new * (1 - lr * weight_decay)  # [n]
    write(param, new, seed, step)
    for values, state, absmax, qmap in ((m, state1, absmax1, qmap1), (v, state2, absmax2, qmap2)):
        codes, scale = encode(values, qmap, block_size)  # [n], [blocks]
        state.copy_(codes.view(state.shape))
        absmax.copy_(scale)


def step_32bit(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    seed: int | None,
    decay_first: bool,
) -> None:
    g = grad.float() * grad_scale  # param.shape
    exp_avg.copy_(beta1 * exp_avg + (1 - beta1) * g)
    exp_avg_sq.copy_(beta2 * exp_avg_sq + (1 - beta2) * g * g)
    decay = weight_decay if decay_first else 0.0
    new = adamw(param.float(), exp_avg, exp_avg_sq, lr, beta1, beta2, eps, decay, step)  # param.shape
    if not decay_first:
        new = new * (1 - lr * weight_decay)  # param.shape
    write(param, new.flatten(), seed, step)
