"""Hopper's products: four warps multiply tiles of shared memory, and go on before the result is there.

wgmma.m64nNk16: D [64, N] += A [64, 16] B [16, N]. A comes from registers, laid out as mma's in each warp, or like B
from shared memory through a descriptor: start, two distances, and a swizzle (address bits 4.. xored with bits 7..).
Like asynchronous copies, products are made when they are waited for (late) or when they are issued (at once).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .faults import UnknownInstruction
from .machine import Blocks, instruction
from .matrix import left_operand
from .numbers import KINDS, Array
from .parse import Instruction, Operand, Vector
from .shared_memory import SEVERAL
from .transfers import everyone

WARPS, THREADS, ROWS, DEPTH = 4, 128, 64, 16
SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}  # mode: bytes of a row, mask of the bits that are xored


class Tile(NamedTuple):
    """A descriptor in each warpgroup, of `outer` rows (A) or columns (B) by 16."""

    descriptor: Array  # [B, groups]
    outer: int
    transposed: bool  # stored with its rows (A) or columns (B) side by side


class Product(NamedTuple):
    group: Array  # [B] the number of groups that the block had committed before
    mask: Array  # [B, T]
    left: Array | Tile  # [B * groups, 64, 16] from registers
    right: Tile
    target: Vector
    kind: str
    adds: Array  # whether D is added to


@instruction("wgmma")
def products(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    if current.modifiers[0] == "fence":
        blocks.whole_blocks(mask)
    elif current.modifiers[0] == "commit_group":
        blocks.committed_products[blocks.whole_blocks(mask)] += 1
    elif current.modifiers[0] == "wait_group":
        _wait(blocks, blocks.whole_blocks(mask), current.operands[0].value)
    elif current.modifiers[0] == "mma_async":
        _issue(blocks, current, mask)
    else:
        raise UnknownInstruction(f"{current.text!r}: this form is not known here")


def _issue(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    target, a, b, adds, *flags = current.operands
    shape, result, kind, other = current.modifiers[3:7]
    if result != "f32" or kind != other or kind not in ("bf16", "f16") or not shape.startswith("m64n"):
        raise UnknownInstruction(f"{current.text!r}: this product is not known here")
    blocks.whole_blocks(mask)
    scale_a, scale_b, *transposed = (flag.value for flag in flags)
    if (scale_a, scale_b) != (1, 1):
        raise UnknownInstruction(f"{current.text!r}: negated operands are not known here")
    columns = int(shape[4:].split("k")[0])
    if isinstance(a, Vector):
        left: Array | Tile = left_operand(blocks, a, kind).reshape(-1, ROWS, DEPTH)
    else:
        left = Tile(_descriptor(blocks, a), ROWS, bool(transposed[0]))
    right = Tile(_descriptor(blocks, b), columns, bool(transposed[-1]))
    active = everyone(blocks, mask).copy()
    added = blocks.full(blocks.bits(adds, 1)).copy()
    one = Product(blocks.committed_products.copy(), active, left, right, target, kind, added)
    for tile in (left, right):
        if isinstance(tile, Tile):
            _read(blocks, tile, one.mask)  # what is not there yet is told where the product is issued
    if blocks.copies_land_late:
        blocks.products.append(one)
    else:
        _finish(blocks, one, one.mask)


def _wait(blocks: Blocks, waiting: Array, most_pending: int) -> None:
    still = []
    for one in blocks.products:
        ready = one.mask & (waiting & (one.group < blocks.committed_products - most_pending))[:, None]
        if ready.any():
            _finish(blocks, one, ready)
        if (one.mask & ~ready).any():
            still.append(one._replace(mask=one.mask & ~ready))
    blocks.products = still


def _finish(blocks: Blocks, one: Product, mask: Array) -> None:
    left = _read(blocks, one.left, mask, one.kind) if isinstance(one.left, Tile) else one.left
    right = _read(blocks, one.right, mask, one.kind)
    product = torch.bmm(torch.from_numpy(left), torch.from_numpy(right).mT).numpy()  # [N, 64, columns]
    columns = one.right.outer
    product = product.reshape(-1, WARPS, 2, 8, columns // 8, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6)
    product = product.reshape(*blocks.shape, columns // 2)  # a thread's registers: 8 columns, lower rows, pair
    for i, register in enumerate(one.target.parts):
        result = product[..., i]
        if one.adds.any():  # a first product's D holds nothing yet
            result = result + np.where(one.adds, blocks.value(register, "f32"), np.float32(0))
        blocks.put(register, result, "f32", mask)


def _descriptor(blocks: Blocks, operand: Operand) -> Array:
    """[B, groups]: every warp of a group gives the same."""
    given = blocks.full(blocks.bits(operand, 64)).reshape(blocks.shape[0], -1, THREADS)
    if (given != given[..., :1]).any():
        raise UnknownInstruction("a descriptor that differs within a warpgroup")
    return given[..., 0].copy()


def _read(blocks: Blocks, tile: Tile, mask: Array, kind: str = "") -> Array:
    """[B * groups, outer, 16] numbers of a tile; without a kind only the check that it may be read."""
    active = mask.reshape(blocks.shape[0], -1, THREADS).all(-1).ravel()
    descriptor = tile.descriptor.ravel()
    start, lead, stride = (
        ((descriptor >> np.uint64(at)) & np.uint64(0x3FFF)).astype(np.int64)[:, None, None] << 4 for at in (0, 16, 32)
    )
    modes = set((descriptor >> np.uint64(62)).tolist())
    if len(modes) != 1 or not modes <= set(SWIZZLES):
        raise UnknownInstruction(f"a descriptor of swizzle {modes}")
    span, bits = SWIZZLES[modes.pop()]
    outer, depth = np.meshgrid(np.arange(tile.outer), np.arange(DEPTH), indexing="ij")
    if tile.transposed:  # rows of `span` bytes along `outer`; eight depths together, then `stride`; spans `lead` apart
        per = span // 2
        at = start + lead * (outer // per) + stride * (depth // 8) + depth % 8 * span + outer % per * 2
    else:  # rows of `span` bytes along the depth; eight of `outer` together, then `stride`
        at = start + stride * (outer // 8) + outer % 8 * span + depth * 2
    at ^= (at >> 7 & bits) << 4
    block = np.repeat(np.arange(blocks.shape[0]), len(descriptor) // blocks.shape[0])
    block, place = np.broadcast_arrays(block[:, None, None], at)
    found = np.zeros((*place.shape, 2), np.uint8)
    block, place = block[active].ravel(), place[active].ravel()
    warps = np.full(place.shape, SEVERAL)
    found[active] = blocks.shared.read(block, warps, place, 2).reshape(-1, *found.shape[1:])
    return KINDS[kind].decode(found.view(np.uint16)[..., 0]) if kind else found
