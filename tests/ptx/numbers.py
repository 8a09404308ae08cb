"""Kinds of PTX values (`.f32`, `.s64`, `.bf16x2`, ...): how the bits of a register become numbers and come back.

A register holds unsigned integers. 16-bit floats are computed in float32, as the instructions that take them are
defined to round once at the end; a packed kind has a last axis of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
SMALLEST_NORMAL = np.float32(2.0**-126)


class Kind(NamedTuple):
    bits: int
    decode: Callable[[Array], Array]  # unsigned integers of `bits` -> numbers
    encode: Callable[[Array], Array]
    floating: bool = False


def float_of_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bfloat16_of_float(x: Array) -> Array:
    """Round to nearest, ties to even; NaN becomes the canonical one."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded >> np.uint32(16)).astype(np.uint16)


def float_of_float16(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float32)


def float16_of_float(x: Array) -> Array:
    return np.asarray(x).astype(np.float16).view(np.uint16)


def _single(x: Array) -> Array:
    return np.asarray(x).astype(np.float32, copy=False).view(np.uint32)


def _integer(bits: int, signed: bool) -> Kind:
    unsigned = UNSIGNED[bits]
    dtype = SIGNED[bits] if signed else unsigned
    return Kind(bits, lambda x: x.view(dtype), lambda x: np.asarray(x).astype(dtype, copy=False).view(unsigned))


def _pair(half: Kind) -> Kind:
    """Two values in one register, the low half first."""
    whole, part = UNSIGNED[2 * half.bits], UNSIGNED[half.bits]

    def decode(x: Array) -> Array:
        return half.decode(np.ascontiguousarray(x).reshape(*x.shape, 1).view(part))

    def encode(x: Array) -> Array:
        return np.ascontiguousarray(half.encode(x)).view(whole)[..., 0]

    return Kind(2 * half.bits, decode, encode, half.floating)


def _same(x: Array) -> Array:
    return x


KINDS: dict[str, Kind] = {
    "pred": Kind(1, _same, _same),
    "f32": Kind(32, lambda x: x.view(np.float32), _single, True),
    "bf16": Kind(16, float_of_bfloat16, bfloat16_of_float, True),
    "f16": Kind(16, float_of_float16, float16_of_float, True),
}
for _bits in UNSIGNED:
    KINDS[f"s{_bits}"] = _integer(_bits, signed=True)
    KINDS[f"u{_bits}"] = KINDS[f"b{_bits}"] = _integer(_bits, signed=False)
for _half in ("f32", "bf16", "f16", "s16", "u16"):
    KINDS[f"{_half}x2"] = _pair(KINDS[_half])


def flushed(x: Array) -> Array:
    """Subnormal float32 numbers as zeros of their sign: what `.ftz` does to operands and results."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)
