"""Tensor cores of a warp: ldmatrix and stmatrix move 8 x 8 tiles of 16 bits, mma.m16n8k16 multiplies.

Who holds what, from the PTX manual: lane = 4 g + q. A tile's row g is held by the four lanes of g, columns 2q and
2q + 1 in one register. mma's A [16, 16] is four such tiles (upper and lower rows of the left half, then of the right),
B [16, 8] two tiles with g its column, D [16, 8] in float32 the upper rows and then the lower.
"""

from __future__ import annotations

import numpy as np
import torch

from .faults import UnknownInstruction
from .machine import WARP, Blocks, instruction
from .numbers import KINDS, Array
from .parse import Instruction, Operand
from .transfers import address_of

ROWS, ROW_BYTES = 8, 16


def _tiles(current: Instruction) -> tuple[int, bool]:
    """How many tiles, and whether they are transposed on the way."""
    return next(int(m[1]) for m in current.modifiers if m in ("x1", "x2", "x4")), "trans" in current.modifiers


def _rows(blocks: Blocks, place: Operand, tiles: int, mask: Array | None) -> tuple[Array, Array, Array]:
    """Block, warp and address of each row: lanes 8 i to 8 i + 7 give the rows of tile i. [N, tiles, 8]"""
    warps = blocks.whole_warps(mask)
    take = (..., slice(ROWS * tiles))
    addresses = blocks.lanes(address_of(blocks, place))[warps][take].reshape(-1, tiles, ROWS)
    block = blocks.lanes(blocks.block_of)[warps][take].reshape(-1, tiles, ROWS)
    warp = blocks.lanes(blocks.warp_of)[warps][take].reshape(-1, tiles, ROWS)
    return block, warp, addresses


def _note_rows(blocks: Blocks, kind: str, addresses: Array) -> None:
    """A tile is one pass of eight lanes."""
    if blocks.traffic is not None:
        rows = addresses.reshape(-1, ROWS)
        blocks.traffic.note_shared(kind, rows, np.ones(rows.shape, bool), ROW_BYTES)


@instruction("ldmatrix")
def load_tiles(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    tiles, transposed = _tiles(current)
    target, place = current.operands
    block, warp, addresses = _rows(blocks, place, tiles, mask)
    _note_rows(blocks, "ldmatrix", addresses)
    found = blocks.shared.read(block.ravel(), warp.ravel(), addresses.ravel(), ROW_BYTES)
    tile = found.view(np.uint16).reshape(-1, tiles, ROWS, ROWS)
    tile = np.ascontiguousarray(tile.swapaxes(-1, -2) if transposed else tile)
    held = tile.view(np.uint32).reshape(-1, tiles, WARP)  # a pair of columns a lane
    warps = blocks.whole_warps(mask)
    for i, register in enumerate(blocks.vector(target)):
        values = np.zeros((*warps.shape, WARP), np.uint32)
        values[warps] = held[:, i]
        blocks.put_bits(register, values.reshape(blocks.shape), mask)


@instruction("stmatrix")
def store_tiles(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    tiles, transposed = _tiles(current)
    place, source = current.operands
    block, warp, addresses = _rows(blocks, place, tiles, mask)
    _note_rows(blocks, "stmatrix", addresses)
    warps = blocks.whole_warps(mask)
    held = np.stack([blocks.lanes(blocks.bits(x, 32))[warps] for x in blocks.vector(source)], 1)  # [N, tiles, 32]
    tile = held.view(np.uint16).reshape(-1, tiles, ROWS, ROWS)
    tile = np.ascontiguousarray(tile.swapaxes(-1, -2) if transposed else tile)
    blocks.shared.write(block.ravel(), warp.ravel(), addresses.ravel(), tile.view(np.uint8).reshape(-1, ROW_BYTES))


def _halves(blocks: Blocks, operand: Operand, kind: str) -> Array:
    """[B * warps, 8 g, 4 q, registers, 2] numbers of a vector of registers, two 16-bit floats each."""
    parts = [blocks.lanes(blocks.bits(x, 32)).reshape(-1, ROWS, 4) for x in blocks.vector(operand)]
    return KINDS[kind].decode(np.stack(parts, -1)[..., None].view(np.uint16))


def left_operand(blocks: Blocks, operand: Operand, kind: str) -> Array:
    """A of every warp: [B * warps, 16, 16]. Register 2 i + j holds half i of the columns, half j of the rows."""
    held = _halves(blocks, operand, kind).reshape(-1, ROWS, 4, 2, 2, 2)
    return np.ascontiguousarray(held.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16))


@instruction("mma")
def multiply(blocks: Blocks, current: Instruction, mask: Array | None) -> None:
    """D = A B + C. Products of 16-bit floats are exact in float32; sums are taken in float32, in torch's order."""
    kind = current.modifiers[6]
    if current.modifiers[2] != "m16n8k16" or current.modifiers[5:] != ("f32", kind, kind, "f32"):
        raise UnknownInstruction(f"{current.text!r}: this product is not known here")
    d, a, b, c = current.operands
    blocks.whole_warps(mask)
    left = left_operand(blocks, a, kind)
    right = _halves(blocks, b, kind).transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)
    product = torch.bmm(torch.from_numpy(left), torch.from_numpy(right)).numpy()  # [N, 16, 8]
    product = product.reshape(-1, 2, ROWS, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, WARP, 4)
    for i, (register, added) in enumerate(zip(blocks.vector(d), blocks.vector(c), strict=True)):
        blocks.put(register, product[..., i].reshape(blocks.shape) + blocks.value(added, "f32"), "f32", mask)
