"""int8_weight: a frozen weight as 8-bit codes, with a scale for every 64 inputs of an output.

    w[o, k] = code[o, k] scale[o, k // 64],  k over kh, kw, C: the order in which a channels-last image is multiplied

codes int8 [O, C] or [O, C, kh, kw], the latter channels-last; scales int16 [O, ceil(K / 64)], K inputs: the bits of
bfloat16 numbers, so that a network that is cast leaves them alone. A weight is expanded for the time of one product.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _check as check
from ..._direct import watched
from ..._dispatch import Op, define, forced_backend
from ..._layout import weight_format
from .reference import BLOCK

OP = Op("int8_weight", __package__)
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}  # a schema has no dtype as a number
DTYPES = {code: dtype for dtype, code in CODES.items()}


class Int8Weight(NamedTuple):
    """A frozen weight in 8 bits, in the place of a tensor wherever an op takes a frozen one."""

    codes: Tensor
    scales: Tensor


def blocks_of(shape: torch.Size) -> int:
    """How many scales an output of a weight of this shape has."""
    return -(-prod(shape[1:]) // BLOCK)


def _check_weight(weight: Tensor) -> None:
    check.floating("weight", weight)
    check.not_empty("weight", weight)
    check.require(
        weight.dim() in (2, 4), lambda: f"weight must be [O, C] or [O, C, kh, kw], not of shape {tuple(weight.shape)}"
    )


def check_int8(codes: Tensor, scales: Tensor) -> None:
    """What an 8-bit weight must be, one sentence for each thing that is wrong."""
    check.tensor("codes", codes)
    check.tensor("scales", scales)
    check.dtype_in("codes", codes, (torch.int8,))
    check.dtype_in("scales", scales, (torch.int16,))
    check.not_empty("codes", codes)
    check.require(codes.dim() in (2, 4), lambda: f"codes must be [O, C] or [O, C, kh, kw], not {tuple(codes.shape)}")
    check.shape("scales", scales, (codes.shape[0], blocks_of(codes.shape)), "[O, ceil(inputs / 64)]")
    check.same_device("scales", scales, "codes", codes)
    in_order = codes.is_contiguous(memory_format=weight_format(codes))
    check.require(in_order, lambda: "codes must lie in the order that quantize gives them (convolutions channels-last)")


def _quantize(weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    _check_weight(weight)
    codes, scales = OP.select(backend, weight.device.type, weight).quantize(weight)
    return codes, scales


def _quantize_fake(weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    _check_weight(weight)
    codes = torch.empty_like(weight, dtype=torch.int8, memory_format=weight_format(weight))
    return codes, weight.new_empty((weight.shape[0], blocks_of(weight.shape)), dtype=torch.int16)


def _choose_expand(codes: Tensor, scales: Tensor, dtype: int, backend: str) -> Any:
    check_int8(codes, scales)
    return OP.select(backend, codes.device.type, _example(codes, dtype))


def _example(codes: Tensor, dtype: int) -> Tensor:
    """What the implementations' `reason` looks at: a tensor like the result, without memory."""
    return codes.new_empty((0,), dtype=DTYPES[dtype])


def _expand(chosen: Any, codes: Tensor, scales: Tensor, dtype: int, backend: str) -> Tensor:
    return chosen.expand(codes, scales, DTYPES[dtype])


def _expand_fake(codes: Tensor, scales: Tensor, dtype: int, backend: str) -> Tensor:
    check_int8(codes, scales)
    return torch.empty_like(codes, dtype=DTYPES[dtype], memory_format=weight_format(codes))


_QUANTIZE = define("int8_weight_quantize(Tensor weight, str backend) -> (Tensor, Tensor)", _quantize, _quantize_fake)
_EXPAND = define(
    "int8_weight_expand(Tensor codes, Tensor scales, int dtype, str backend) -> Tensor",
    _expand,
    _expand_fake,
    choose=_choose_expand,
)


def quantize_weight(weight: Tensor) -> Int8Weight:
    """A frozen weight in 8 bits: each code is the nearest, and a block's largest value is not cut off.

    Args:
        weight: [O, C] or [O, C, kh, kw], finite.
    """
    check.tensor("weight", weight)
    return Int8Weight(*_QUANTIZE(weight.detach(), forced_backend()))


def expand_weight(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """The weight that the codes and scales stand for, rounded to `dtype`; a convolution's is channels-last."""
    check.require_type(dtype in CODES, lambda: f"dtype must be a floating-point one, not {dtype}")
    return _EXPAND(weight.codes, weight.scales, CODES[dtype], forced_backend())


def lent_weight(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """`expand_weight` for one product, which ends before the next weight is asked for: CPUs use one place for all."""
    codes, scales = weight
    seen = torch.compiler.is_compiling() or watched()  # a graph being compiled takes no look at what watches
    if seen or not isinstance(codes, Tensor) or codes.device.type != "cpu" or dtype not in CODES:
        return expand_weight(weight, dtype)
    check_int8(codes, scales)
    chosen = OP.select(forced_backend(), "cpu", _example(codes, CODES[dtype]))
    lend = getattr(chosen, "lend", chosen.expand)
    lent: Tensor = lend(codes, scales, dtype)
    return lent
