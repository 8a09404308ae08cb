"""Shared memory of a batch of blocks, and who touched each word of it since which barrier.

A word is never written, in flight (an asynchronous copy into it is not waited for), or written by a warp in an epoch:
the number of barriers its block had passed. Another warp may read it, or write over it, in a later epoch only. The
interpreter runs warps in order, so such a race would show in no value.
"""

from __future__ import annotations

import numpy as np

from .faults import InFlight, Misaligned, OutOfBounds, Race, Uninitialised
from .numbers import UNSIGNED, Array

WARPS = 64  # codes are epoch * WARPS + warp; the last warp number stands for several
SEVERAL = WARPS - 1
NEVER, IN_FLIGHT = -1, -2


class SharedMemory:
    def __init__(self, blocks: int, size: int) -> None:
        self.words = -(-max(size, 4) // 16) * 4
        self.size = size
        self.data = np.full(blocks * self.words * 4, 0xFF, np.uint8)  # NaN in every float format
        self.writer = np.full(blocks * self.words, NEVER, np.int32)
        self.reader = np.full(blocks * self.words, NEVER, np.int32)
        self.epoch = np.zeros(blocks, np.int32)

    def barrier(self, blocks: Array) -> None:
        self.epoch[blocks] += 1

    def read(self, block: Array, warp: Array, address: Array, width: int) -> Array:
        """[N] addresses in [N] blocks -> [N, width] bytes."""
        at = self._place(block, address, width)
        word = min(width, 8)
        cells = self._words(at, width)
        self.check_read(block, warp, cells)
        return self.data.view(UNSIGNED[8 * word])[at[:, None] // word + np.arange(width // word)].view(np.uint8)

    def check_read(self, block: Array, warp: Array, cells: Array) -> None:
        """A read of `cells` [N, words] by these warps: in order, and from now on known."""
        writer = self.writer[cells]
        if writer.min(initial=0) < 0:
            if (writer == IN_FLIGHT).any():
                raise InFlight("a read of shared memory whose asynchronous copy is not waited for")
            raise Uninitialised("a read of shared memory that nothing has written")
        start = (self.epoch[block] * WARPS)[:, None]  # what is less was touched before the last barrier
        code = np.broadcast_to(start + warp[:, None], cells.shape)
        recent = writer >= start
        if recent.any() and (recent & (writer != code)).any():
            raise Race("a read of shared memory that another warp wrote since the last barrier")
        others = self.reader[cells]
        others = (others >= start) & (others != code)
        self.reader[cells] = np.where(others, start + SEVERAL, code) if others.any() else code
        # several warps in one instruction, of which the assignment kept the last
        lost = (self.reader[cells] != code) & ~others
        if lost.any():
            self.reader[cells[lost]] = np.broadcast_to(start + SEVERAL, cells.shape)[lost]

    def write(self, block: Array, warp: Array, address: Array, values: Array) -> None:
        """`values`: [N, width] bytes."""
        width = values.shape[1]
        at = self._place(block, address, width)
        cells = self._words(at, width)
        self._check_write(block, warp, cells)
        self._put(at, values)
        self.writer[cells] = (self.epoch[block] * WARPS + warp)[:, None]

    def begin_copy(self, block: Array, warp: Array, address: Array, width: int) -> None:
        """An asynchronous copy into these places was issued."""
        cells = self._words(self._place(block, address, width), width)
        self._check_write(block, warp, cells)
        self.writer[cells] = IN_FLIGHT

    def end_copy(self, block: Array, warp: Array, address: Array, values: Array) -> None:
        """The copy was waited for: seen by its own warp now, by the others after a barrier."""
        at = self._place(block, address, values.shape[1])
        self._put(at, values)
        self.writer[self._words(at, values.shape[1])] = (self.epoch[block] * WARPS + warp)[:, None]

    def put_early(self, block: Array, address: Array, values: Array) -> None:
        """A copy lands before it is waited for; it stays in flight for whoever asks."""
        self._put(self._place(block, address, values.shape[1]), values)

    def _put(self, at: Array, values: Array) -> None:
        width = values.shape[1]
        word = min(width, 8)
        places = at[:, None] // word + np.arange(width // word)
        self.data.view(UNSIGNED[8 * word])[places] = np.ascontiguousarray(values).view(UNSIGNED[8 * word])

    def _check_write(self, block: Array, warp: Array, cells: Array) -> None:
        if (self.writer[cells] == IN_FLIGHT).any():
            raise InFlight("a write to shared memory whose asynchronous copy is not waited for")
        reader = self.reader[cells]
        own = (self.epoch[block] * WARPS + warp)[:, None]
        if ((reader // WARPS == own // WARPS) & (reader != own)).any():
            raise Race("a write to shared memory that another warp read since the last barrier")

    def _place(self, block: Array, address: Array, width: int) -> Array:
        at = address.astype(np.int64)
        if (at % width).any():
            raise Misaligned(f"an access of {width} bytes of shared memory at no multiple of {width}")
        if ((at < 0) | (at + width > self.size)).any():
            raise OutOfBounds(f"an access of shared memory beyond the {self.size} bytes that the kernel asked for")
        return at + block.astype(np.int64) * (self.words * 4)

    @staticmethod
    def _words(at: Array, width: int) -> Array:
        return at[:, None] // 4 + np.arange(max(width // 4, 1))
