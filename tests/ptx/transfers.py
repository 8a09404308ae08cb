"""Loads, stores and asynchronous copies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .faults import UnknownInstruction
from .machine import Blocks, instruction
from .numbers import KINDS, UNSIGNED, Array
from .parse import Address, Constant, Instruction, Register


def address_of(blocks: Blocks, operand: Address) -> Array:
    """[B, T] addresses, int64."""
    assert isinstance(operand, Address) and isinstance(operand.base, Register | Constant)
    bits = operand.base.bits if isinstance(operand.base, Register) else 32
    return blocks.full(blocks.bits(operand.base, bits).astype(np.int64) + operand.offset)


def everyone(blocks: Blocks, mask: Array | None) -> Array:
    return blocks.full(np.array([[True]]) if mask is None else mask)


def _vector(current: Instruction) -> int:
    return next((int(m[1]) for m in current.modifiers if m in ("v2", "v4")), 1)


@instruction("ld")
def load(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    target, place = current.operands
    if "param" in current.modifiers:
        _load_parameter(blocks, current, mask)
        return
    count, bits = _vector(current), KINDS[current.kind].bits
    width = count * bits // 8
    active = everyone(blocks, mask)
    at = address_of(blocks, place)
    found = np.full((*blocks.shape, width), 0xFF, np.uint8)
    if "shared" in current.modifiers:
        note(blocks, "shared", "load", at, active, width)
        found[active] = blocks.shared.read(blocks.block_of[active], blocks.warp_of[active], at[active], width)
    elif "global" in current.modifiers:
        note(blocks, "global", "load", at, active, width)
        found[active] = blocks.memory.load(at[active], width, blocks.programs[blocks.block_of[active]])
    else:
        raise UnknownInstruction(f"{current.text!r}: a load from another space is not known here")
    values = found.view(UNSIGNED[bits])
    for i, register in enumerate(blocks.vector(target)):
        blocks.put_bits(register, np.ascontiguousarray(values[..., i]), mask)


def _load_parameter(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    target, place = current.operands
    value = Constant(blocks.arguments[place.base])
    if target.bits == 64 and current.kind == "s32":  # the register keeps the sign
        blocks.put_bits(target, blocks.value(value, "s32").astype(np.int64).view(np.uint64), mask)
    else:
        blocks.put_bits(target, blocks.bits(value, KINDS[current.kind].bits), mask)


@instruction("st")
def store(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    place, source = current.operands
    bits = KINDS[current.kind].bits
    values = np.stack([blocks.full(blocks.bits(x, bits)) for x in blocks.vector(source)], -1).view(np.uint8)
    width = values.shape[-1]
    active = everyone(blocks, mask)
    at = address_of(blocks, place)
    if "shared" in current.modifiers:
        note(blocks, "shared", "store", at, active, width)
        block, warp = blocks.block_of[active], blocks.warp_of[active]
        blocks.shared.write(block, warp, at[active], values[active])
    elif "global" in current.modifiers:
        note(blocks, "global", "store", at, active, width)
        blocks.memory.store(at[active], values[active], blocks.programs[blocks.block_of[active]])
    else:
        raise UnknownInstruction(f"{current.text!r}: a store to another space is not known here")


def note(blocks: Blocks, space: str, kind: str, at: Array, active: Array, width: int) -> None:
    if blocks.traffic is not None:
        count = blocks.traffic.note_shared if space == "shared" else blocks.traffic.note_global
        count(kind, blocks.lanes(at).reshape(-1, 32), blocks.lanes(active).reshape(-1, 32), width)


class Copy(NamedTuple):
    """Of one cp.async instruction: N threads, each `width` bytes or, where `reads` is false, that many zeros."""

    block: Array
    warp: Array
    group: Array  # the number of groups that the block had committed before
    target: Array
    source: Array
    reads: Array
    width: int

    def where(self, chosen: Array) -> Copy:
        return Copy(*(field[chosen] for field in self[:-1]), self.width)


@instruction("cp")
def copy(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    """Groups complete in order. A copy lands when its group is waited for (late) or when it is issued (early)."""
    if current.modifiers == ("async", "commit_group"):
        blocks.committed[blocks.whole_blocks(mask)] += 1
    elif current.modifiers == ("async", "wait_group"):
        _wait(blocks, blocks.whole_blocks(mask), current.operands[0].value)
    elif current.modifiers[0] == "async" and current.modifiers[-2:] == ("shared", "global"):
        _issue(blocks, current, mask)
    else:
        raise UnknownInstruction(f"{current.text!r}: this copy is not known here")


def _issue(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    target, source, size, *read = current.operands
    width, active = size.value, everyone(blocks, mask)
    to, source_at = address_of(blocks, target), address_of(blocks, source)
    given = blocks.full(blocks.bits(read[0], 32)) if read else np.full(blocks.shape, width)
    if (active & (given != 0) & (given != width)).any():
        raise UnknownInstruction(f"{current.text!r}: a copy of some of its bytes is not known here")
    reads = given != 0
    note(blocks, "global", "copy", source_at, active & reads, width)
    note(blocks, "shared", "copy", to, active, width)
    block, warp = blocks.block_of[active], blocks.warp_of[active]
    one = Copy(block, warp, blocks.committed[block], to[active], source_at[active], reads[active], width)
    blocks.shared.begin_copy(one.block, one.warp, one.target, width)
    blocks.copies.append(one)
    found = _bytes_of(blocks, one)  # a bad address is told where it is issued
    if not blocks.copies_land_late:
        blocks.shared.put_early(one.block, one.target, found)


def _wait(blocks: Blocks, waiting: Array, most_pending: int) -> None:
    """In these blocks all groups but the last `most_pending` have landed."""
    still = []
    for one in blocks.copies:
        ready = waiting[one.block] & (one.group < blocks.committed[one.block] - most_pending)
        if not ready.all():
            still.append(one.where(~ready))
        if ready.any():
            landed = one.where(ready)
            blocks.shared.end_copy(landed.block, landed.warp, landed.target, _bytes_of(blocks, landed))
    blocks.copies = still


def _bytes_of(blocks: Blocks, one: Copy) -> Array:
    found = np.zeros((len(one.target), one.width), np.uint8)
    program = blocks.programs[one.block[one.reads]]
    found[one.reads] = blocks.memory.load(one.source[one.reads], one.width, program)
    return found
