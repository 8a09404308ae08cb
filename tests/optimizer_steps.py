"""One 8-bit step from a given state, held against float64: what a rounding decides may go either way, nothing else.

Steps are not compared one after another on two backends: a moment that lies halfway between two codes, but for a
rounding, takes either; the moment decoded from it then differs by a whole code, and so on. So every step begins from
the same state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import pcs_kernels
from pcs_kernels.ops.adamw8bit import codes

LR, BETA1, BETA2, EPS, DECAY, BLOCK, SCALE, SEED = 1e-3, 0.9, 0.999, 1e-8, 1e-2, 256, 0.5, 11
NUMBERS = (LR, BETA1, BETA2, EPS, DECAY)
ROUNDINGS = 8 * torch.finfo(torch.float32).eps  # of a handful of float32 operations


@dataclass
class State:
    """A parameter and its two coded moments."""

    param: Tensor
    codes: list[Tensor]
    scales: list[Tensor]

    @staticmethod
    def first(n: int, dtype: torch.dtype, device: str) -> State:
        """Before step 1: moments of zero."""
        zeros = [int(codes.code_map(signed).abs().argmin()) for signed in (True, False)]
        coded = [torch.full((n,), zero, dtype=torch.uint8, device=device) for zero in zeros]
        scales = [torch.zeros(codes.blocks(n, BLOCK), device=device) for _ in range(2)]
        return State(torch.randn(n).to(device, dtype), coded, scales)

    def copy(self) -> State:
        return State(self.param.clone(), [c.clone() for c in self.codes], [s.clone() for s in self.scales])


def stepped(state: State, grad: Tensor, step: int, backend: str) -> State:
    """The state after a step on a backend."""
    new = state.copy()
    maps = [codes.code_map(signed).to(grad.device) for signed in (True, False)]
    with pcs_kernels.backend(backend):
        pcs_kernels.ops.adamw8bit.step_8bit(
            new.param, grad, *new.codes, *new.scales, *maps, *NUMBERS, step, BLOCK, SCALE, SEED, True
        )
    return new


def assert_stepped(found: State, reference: State, before: State, grad: Tensor, step: int) -> None:
    """`found` holds the moments' nearest codes and the new parameter, as far as float32 can tell."""
    moments = []
    g = grad.double() * SCALE  # [n]
    for i, (beta, new) in enumerate(((BETA1, g), (BETA2, g * g))):
        qmap = codes.code_map(i == 0).to(grad.device).double()  # [256]
        moment = beta * codes.decode(before.codes[i], before.scales[i].double(), qmap, BLOCK) + (1 - beta) * new  # [n]
        moments.append(moment)
        _, scales = codes.encode(moment, qmap, BLOCK)  # [blocks]
        torch.testing.assert_close(found.scales[i].double(), scales, rtol=ROUNDINGS, atol=0)
        scaled = moment / scales.clamp_min(1e-300).repeat_interleave(BLOCK)[: moment.numel()]  # [n]
        least = (scaled[:, None] - qmap).abs().amin(1)  # [n]
        away = (scaled - qmap[found.codes[i].long()]).abs()  # [n]
        # a map holds float32 values, and of two that are as near the moment's own rounding decides
        assert bool((away <= least + ROUNDINGS * scaled.abs().clamp_min(1e-7)).all()), f"moment {i + 1}: not nearest"
    m, v = moments
    correction2 = math.sqrt(1 - BETA2**step)
    size = LR * correction2 / (1 - BETA1**step)
    new = before.param.double() * (1 - LR * DECAY) - size * (m / (v.sqrt() + EPS * correction2))  # [n]
    unit = torch.finfo(found.param.dtype).eps * before.param.double().abs().clamp_min(2.0**-10)  # [n]
    if found.param.dtype == torch.float32:
        assert bool(((found.param.double() - new).abs() <= 8 * unit + ROUNDINGS * LR).all()), "the parameter"
        return
    assert bool(((found.param.double() - new).abs() <= 2 * unit).all()), "the parameter"
    # the random bits are the same: another value only where 2^-16 of a unit decides
    other = int((found.param != reference.param).sum())
    assert other <= max(1, found.param.numel() // 1000), f"{other} parameters are rounded another way"
