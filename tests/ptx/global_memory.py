"""Global memory: the tensors of one launch, each a range of its own with nothing readable around it.

Every byte is known to be outside, allocated or written. Every two bytes know which program of this launch wrote
them: blocks run in any order on a GPU, so no program may touch what another one writes.
"""

from __future__ import annotations

import numpy as np

from .faults import Misaligned, OutOfBounds, Race, Uninitialised
from .numbers import UNSIGNED, Array

START = 1 << 40  # no offset of a tensor reaches an address near 0
GAP = 4096
OUTSIDE, ALLOCATED, WRITTEN = 0, 1, 3  # of a byte


class GlobalMemory:
    def __init__(self, tensors: list[tuple[Array, Array | None]], watch_programs: bool = True) -> None:
        """`tensors`: the bytes of each, and which are written (None: all). `watch_programs`: who writes what."""
        self.tensors = tensors
        self.starts: list[int] = []
        self.shown: set[int] = set()  # tables, whose addresses are those of this memory here
        end = 0
        for data, _ in tensors:
            self.starts.append(-(-(end + GAP) // 256) * 256)  # where the allocator of a GPU would begin
            end = self.starts[-1] + len(data)
        size = -(-(end + GAP) // 16) * 16
        self.data = np.zeros(size, np.uint8)
        self.state = np.zeros(size, np.uint8)
        self.writer = np.full(size // 2, -1, np.int32) if watch_programs else None
        for start, (data, written) in zip(self.starts, tensors, strict=True):
            self.data[start : start + len(data)] = data
            self.state[start : start + len(data)] = (
                WRITTEN if written is None else np.where(written, WRITTEN, ALLOCATED)
            )

    def address(self, index: int) -> int:
        return START + self.starts[index]

    def show(self, index: int, data: Array) -> None:
        """Let kernels read other bytes than the tensor's own; these stay as they are."""
        self.data[self.starts[index] : self.starts[index] + len(data)] = data
        self.shown.add(index)

    def copy_back(self) -> None:
        """What the launch wrote, into the tensors and into their records of what is written."""
        for index, (start, (data, written)) in enumerate(zip(self.starts, self.tensors, strict=True)):
            if index in self.shown:
                continue
            data[:] = self.data[start : start + len(data)]
            if written is not None:
                written[:] = self.state[start : start + len(data)] == WRITTEN

    def load(self, address: Array, width: int, program: Array) -> Array:
        """[N] addresses -> [N, width] bytes."""
        at = self._place(address, width)
        cells, word = self._cells(at, width)
        if (self.state.view(UNSIGNED[8 * word])[cells] != int.from_bytes([WRITTEN] * word, "little")).any():
            raise Uninitialised(f"a read of {width} bytes of global memory that nothing has written")
        self._watch(at, width, program, writes=False)
        return self.data.view(UNSIGNED[8 * word])[cells].view(np.uint8)

    def store(self, address: Array, values: Array, program: Array) -> None:
        """`values`: [N, width] bytes."""
        width = values.shape[1]
        at = self._place(address, width)
        cells, word = self._cells(at, width)
        self._watch(at, width, program, writes=True)
        self.data.view(UNSIGNED[8 * word])[cells] = np.ascontiguousarray(values).view(UNSIGNED[8 * word])
        self.state.view(UNSIGNED[8 * word])[cells] = int.from_bytes([WRITTEN] * word, "little")

    def _place(self, address: Array, width: int) -> Array:
        at = address.astype(np.int64) - START
        if (at % width).any():
            raise Misaligned(f"an access of {width} bytes at an address that is no multiple of {width}")
        if ((at < 0) | (at + width > len(self.data))).any():
            raise OutOfBounds(f"an access of {width} bytes of global memory outside of every tensor")
        if not (self.state[at] & self.state[at + width - 1]).all():
            raise OutOfBounds(f"an access of {width} bytes of global memory outside of every tensor")
        return at

    @staticmethod
    def _cells(at: Array, width: int) -> tuple[Array, int]:
        """Indices [N, words] into memory seen as words of the second result's bytes."""
        word = min(width, 8)
        return at[:, None] // word + np.arange(width // word), word

    def _watch(self, at: Array, width: int, program: Array, writes: bool) -> None:
        if self.writer is None:
            return
        cells = at[:, None] // 2 + np.arange(max(width // 2, 1))
        before = self.writer[cells]
        if ((before >= 0) & (before != program[:, None])).any():
            raise Race("global memory that another program of the same launch writes")
        if writes:
            self.writer[cells] = program[:, None]
            if (self.writer[cells] != program[:, None]).any():
                raise Race("global memory that two programs of the same launch write")
