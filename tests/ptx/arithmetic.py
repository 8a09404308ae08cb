"""Arithmetic on integers and floats, comparisons and selections."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .faults import UnknownInstruction
from .machine import Blocks, instruction
from .numbers import KINDS, SIGNED, UNSIGNED, Array, flushed
from .parse import Instruction

Function = Callable[..., Array]


def _values(blocks: Blocks, current: Instruction) -> list[Array]:
    """The operands behind the destination. `add.rn.f32.bf16` and its like end in float32: the last operand is."""
    kinds = [current.kind] * (len(current.operands) - 1)
    if _mixed(current):
        kinds[-1] = "f32"
    values = [blocks.value(x, kind) for x, kind in zip(current.operands[1:], kinds, strict=True)]
    return [flushed(x) for x in values] if "ftz" in current.modifiers else values


def _mixed(current: Instruction) -> bool:
    return current.kind in ("bf16", "f16") and current.modifiers[-2:-1] == ("f32",)


def _finish(blocks: Blocks, current: Instruction, result: Array, mask: Array | None) -> None:
    kind = "f32" if _mixed(current) else current.kind
    if "ftz" in current.modifiers:
        result = flushed(result.astype(np.float32))
    blocks.put(current.operands[0], result, kind, mask)


def _least(a: Array, b: Array, c: Array | None = None) -> Array:
    return np.fmin(a, b) if c is None else np.fmin(np.fmin(a, b), c)


def _largest(a: Array, b: Array, c: Array | None = None) -> Array:
    return np.fmax(a, b) if c is None else np.fmax(np.fmax(a, b), c)


PLAIN: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "neg": np.negative,
    "abs": np.abs,
    "min": _least,
    "max": _largest,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": np.reciprocal,
}


@instruction(*PLAIN)
def plain(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    if "NaN" in current.modifiers or "sat" in current.modifiers:
        raise UnknownInstruction(f"{current.text!r}: this form is not known here")
    _finish(blocks, current, PLAIN[current.opcode](*_values(blocks, current)), mask)


def _wide(blocks: Blocks, current: Instruction) -> tuple[Array, Array, int]:
    """Two factors in twice their width, and that width."""
    bits = 2 * KINDS[current.kind].bits
    dtype = SIGNED[bits] if current.kind.startswith("s") else UNSIGNED[bits]
    a, b = (blocks.value(x, current.kind).astype(dtype) for x in current.operands[1:3])
    return a, b, bits


@instruction("mul", "mad")
def multiply(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    """mul.lo keeps the low half of a product, mul.hi the high half, mul.wide all of it; mad adds a third operand."""
    if "wide" in current.modifiers or "hi" in current.modifiers:
        a, b, bits = _wide(blocks, current)
        result = (a * b).view(UNSIGNED[bits])
        if "hi" in current.modifiers:
            result = (result >> UNSIGNED[bits](bits // 2)).astype(UNSIGNED[bits // 2])
        if current.opcode == "mad":
            result = result + blocks.bits(current.operands[3], KINDS[f"u{bits}"].bits)
        blocks.put_bits(current.operands[0], result, mask)
        return
    values = _values(blocks, current)
    result = values[0] * values[1]
    _finish(blocks, current, result + values[2] if current.opcode == "mad" else result, mask)


@instruction("fma")
def fused(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    """One rounding: in float64 the product is exact, and the sum all but always rounds to float32 as if it were."""
    a, b, c = (x.astype(np.float64) for x in _values(blocks, current))
    _finish(blocks, current, a * b + c, mask)


@instruction("div", "rem")
def divide(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    a, b = _values(blocks, current)
    if KINDS[current.kind].floating:
        result = a / b
    elif current.opcode == "rem":
        result = np.fmod(a, np.where(b == 0, b.dtype.type(1), b))
    else:
        b = np.where(b == 0, b.dtype.type(1), b)  # undefined on a GPU too; no kernel uses such a quotient
        result = a // b if current.kind.startswith("u") else np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))
    _finish(blocks, current, result, mask)


COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@instruction("setp")
def compare(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    """`ltu` and its like also hold where a float is NaN; `ne` does not."""
    comparison, kind = current.modifiers[0], current.kind
    if len(current.modifiers) != 2 + ("ftz" in current.modifiers):
        raise UnknownInstruction(f"{current.text!r}: comparisons joined with a predicate are not known here")
    a, b = _values(blocks, current)
    unordered = np.isnan(a) | np.isnan(b) if KINDS[kind].floating else np.array(False)
    if comparison in ("nan", "num"):
        held = unordered if comparison == "nan" else ~unordered
    elif comparison in COMPARISONS:
        held = COMPARISONS[comparison](a, b) & ~unordered
    elif comparison.endswith("u") and comparison[:-1] in COMPARISONS:
        held = COMPARISONS[comparison[:-1]](a, b) | unordered
    else:
        raise UnknownInstruction(f"{current.text!r}: the comparison {comparison} is not known here")
    blocks.put_bits(current.operands[0], held, mask)


@instruction("selp")
def select(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    target, a, b, condition = current.operands
    bits = KINDS[current.kind].bits
    blocks.put_bits(target, np.where(blocks.bits(condition, 1), blocks.bits(a, bits), blocks.bits(b, bits)), mask)
