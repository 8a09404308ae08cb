"""Barriers, and what threads of a warp tell each other. Branches are the machine's own (machine.py)."""

from __future__ import annotations

import numpy as np

from .faults import UnknownInstruction
from .machine import WARP, Blocks, instruction
from .numbers import Array
from .parse import Constant, Instruction


@instruction("bar")
def barrier(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    """bar.sync joins a block; bar.warp.sync joins a warp, whose threads are in lockstep here."""
    if current.modifiers == ("warp", "sync"):
        blocks.whole_warps(mask)
    elif current.modifiers == ("sync",) and current.operands == (Constant(0),):
        blocks.shared.barrier(blocks.whole_blocks(mask))
    else:
        raise UnknownInstruction(f"{current.text!r}: a barrier of some of a block's threads is not known here")


@instruction("shfl")
def shuffle(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    target, source, which, clamp, members = current.operands
    if clamp != Constant(31) or members != Constant(-1):
        raise UnknownInstruction(f"{current.text!r}: a shuffle of some of a warp's threads is not known here")
    blocks.whole_warps(mask)
    lane, by = np.arange(WARP), blocks.lanes(blocks.bits(which, 32)).astype(np.int64)
    if current.modifiers[1] == "bfly":
        sender = lane ^ by
    elif current.modifiers[1] == "idx":
        sender = by % WARP
    else:
        raise UnknownInstruction(f"{current.text!r}: this shuffle is not known here")
    values = np.take_along_axis(blocks.lanes(blocks.bits(source, 32)), sender, -1)
    blocks.put_bits(target, values.reshape(blocks.shape), mask)


@instruction("fence")
def fence(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    """fence.proxy.async: memory has one view here, so there is no order to make (README.md, what it does not prove)."""
    if current.modifiers != ("proxy", "async", "shared"):
        raise UnknownInstruction(f"{current.text!r}: this fence is not known here")
