"""Logic, shifts, fields of bits, moves and conversions between kinds."""

from __future__ import annotations

import numpy as np

from .faults import UnknownInstruction
from .machine import Blocks, instruction
from .numbers import KINDS, SIGNED, UNSIGNED, Array, flushed
from .parse import Constant, Instruction, Vector

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@instruction(*LOGIC)
def logic(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    operands = [blocks.bits(x, KINDS[current.kind].bits) for x in current.operands[1:]]
    blocks.put_bits(current.operands[0], LOGIC[current.opcode](*operands), mask)


@instruction("shl", "shr")
def shift(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    """A shift by the width or more gives 0, or the sign."""
    target, a, amount = current.operands
    bits = KINDS[current.kind].bits
    value, by = blocks.value(a, current.kind), blocks.bits(amount, 32)
    last = np.minimum(by, np.uint32(bits - 1)).astype(value.dtype)
    result = value << last if current.opcode == "shl" else value >> last
    if current.opcode == "shl" or not current.kind.startswith("s"):
        result = np.where(by < bits, result, value.dtype.type(0))
    blocks.put(target, result, current.kind, mask)


@instruction("bfe")
def extract(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    """Bits [start, start + length) of a value, with its sign for `.s32`."""
    target, a, start, length = current.operands
    bits = KINDS[current.kind].bits
    if not (isinstance(start, Constant) and isinstance(length, Constant)):
        raise UnknownInstruction(f"{current.text!r}: a field whose place is not constant is not known here")
    if start.value + length.value > bits or not length.value:
        raise UnknownInstruction(f"{current.text!r}: a field beyond the value is not known here")
    value = blocks.bits(a, bits) << UNSIGNED[bits](bits - start.value - length.value)
    if current.kind.startswith("s"):
        value = value.view(SIGNED[bits])
    blocks.put(target, value >> value.dtype.type(bits - length.value), current.kind, mask)


@instruction("prmt")
def permute(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    """Four bytes chosen among eight by four digits; a digit's top bit asks for copies of that byte's sign."""
    target, a, b, selector = current.operands
    both = blocks.bits(a, 32).astype(np.uint64) | (blocks.bits(b, 32).astype(np.uint64) << np.uint64(32))
    digits = blocks.bits(selector, 32).astype(np.uint64)
    result = np.zeros((1, 1), np.uint64)
    for place in range(4):
        digit = (digits >> np.uint64(4 * place)) & np.uint64(0xF)
        byte = (both >> (np.uint64(8) * (digit & np.uint64(7)))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        result = result | (np.where(digit & np.uint64(8), sign, byte) << np.uint64(8 * place))
    blocks.put_bits(target, result.astype(np.uint32), mask)


@instruction("mov")
def move(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    """Copies; `{a, b}` on one side splits a register into equal parts or joins them, the low part first."""
    target, source = current.operands
    bits = KINDS[current.kind].bits
    if isinstance(target, Vector):
        part = bits // len(target.parts)
        value = blocks.bits(source, bits)
        for i, register in enumerate(target.parts):
            blocks.put_bits(register, (value >> UNSIGNED[bits](i * part)).astype(UNSIGNED[part]), mask)
    elif isinstance(source, Vector):
        part = bits // len(source.parts)
        joined = np.zeros((1, 1), UNSIGNED[bits])
        for i, operand in enumerate(source.parts):
            joined = joined | (blocks.bits(operand, part).astype(UNSIGNED[bits]) << UNSIGNED[bits](i * part))
        blocks.put_bits(target, joined, mask)
    else:
        blocks.put_bits(target, blocks.bits(source, bits), mask)


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt")
def convert(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    to, source = current.modifiers[-2:]
    target, *operands = current.operands
    if "sat" in current.modifiers or "relu" in current.modifiers:
        raise UnknownInstruction(f"{current.text!r}: this form is not known here")
    if to in ("bf16x2", "f16x2"):  # the first operand is the upper half
        high, low = np.broadcast_arrays(*(blocks.value(x, source) for x in operands))
        blocks.put(target, np.stack((low, high), -1), to, mask)
        return
    value = blocks.value(operands[0], source)
    if "ftz" in current.modifiers:
        value = flushed(value)
    if rounding := next((ROUNDINGS[m] for m in current.modifiers if m in ROUNDINGS), None):
        value = rounding(value)
    if KINDS[source].floating and not KINDS[to].floating:  # out of range goes to the end of it, NaN to 0
        value = np.nan_to_num(value.astype(np.float64), nan=0.0)
        limits = np.iinfo(SIGNED[KINDS[to].bits] if to.startswith("s") else UNSIGNED[KINDS[to].bits])
        value = np.clip(value, limits.min, limits.max)
    if to == "s8":  # no register has 8 bits: the sign fills the one that it goes to
        value, to = value.astype(np.int64).astype(np.int8), "s16"
    blocks.put(target, value, to, mask)
