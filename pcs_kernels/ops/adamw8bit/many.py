"""Many tensors in one Triton launch: their addresses stand in a table on the device, a line a tensor.

    column   0      1     2       3       4        5        6  7           8
    of 8     param  grad  state1  state2  absmax1  absmax2  n  first tile  row
    of 32    param  grad  m       v                         n  first tile  row

A program finds its tensor by `tiles` [programs]. The table is made anew where an address has changed. While a CUDA
graph is captured no host memory may be read: the graph then gets a table of zeros, which does nothing, made before, and
`send` fills it before the first replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..._launch import launch
from .codes import device_map, search_tables
from .op import check_step, written
from .triton_impl import TILE, blocks, launch_config
from .triton_kernels import adamw8bit_many_kernel, adamw32bit_many_kernel

COLUMNS = 16
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Entry(NamedTuple):
    """One tensor: contiguous, as the single op takes it."""

    param: Tensor
    grad: Tensor
    states: tuple[Tensor, ...]  # state1, state2, absmax1, absmax2; or m, v in float32
    row: int  # of its numbers


def fits(entry: Entry) -> bool:
    """Whether the one launch takes it: every address is a multiple of 16, which its loads and stores count on."""
    return not any(t.data_ptr() % 16 for t in (entry.param, entry.grad, *entry.states))


class Many:
    """The launches of tensors of one kind: their types, and the bits of their states."""

    def __init__(self, block_size: int | None, stochastic: bool) -> None:
        self.block_size = block_size  # None: float32 states
        self.stochastic = stochastic
        self._known: list[tuple[int, ...]] = []
        self._table: tuple[Tensor, Tensor] | None = None
        self._captured: list[tuple[Tensor, Tensor]] = []  # tables that graphs read whenever they are replayed
        self._spare: tuple[Tensor, Tensor] | None = None
        self._unsent: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []

    def step(self, entries: Sequence[Entry], rows: Tensor, captured: bool) -> None:
        """One step of all.

        Args:
            entries: at least one, all of one type and on one device.
            rows: float32 [P, 12], the numbers (row.py).
            captured: whether a CUDA graph is being captured.
        """
        lines = [_line(entry) for entry in entries]
        if lines != self._known:
            for entry in entries:
                check_step(entry.param, entry.grad, entry.states, self.block_size)
            self._fit(lines, rows.device, captured)
        assert self._table is not None
        table, tiles = self._table
        param, grad = entries[0].param.dtype, entries[0].grad.dtype
        types = {"PARAM": TYPES[param], "GRAD": TYPES[grad]}
        reached = [t for entry in entries for t in (entry.param, entry.grad, *entry.states)]
        stochastic = self.stochastic and param != torch.float32
        given: tuple[Tensor, ...] = table, tiles, rows
        kernel, tail = adamw32bit_many_kernel, {"BLOCK": TILE}
        if self.block_size is not None:
            (bounds1, first1), (bounds2, first2) = (search_tables(signed, rows.device) for signed in (True, False))
            maps = device_map(True, rows.device), device_map(False, rows.device)
            given = (*given, *maps, bounds1, bounds2, first1, first2)
            kernel, tail = adamw8bit_many_kernel, launch_config(self.block_size)
        tail = {"num_warps": 4, "num_stages": 1, "STOCHASTIC": stochastic, **types, **tail}
        launch(kernel, (len(tiles),), *given, reached=reached, **tail)
        written(rows, *(t for entry in entries for t in (entry.param, *entry.states)))

    def send(self) -> None:
        """Fill the tables that captured graphs hold; it does not wait."""
        for here, there in self._unsent:
            for source, target in zip(here, there, strict=True):
                target.copy_(_pinned(source, target.device), non_blocking=True)
        self._unsent.clear()

    def _fit(self, lines: list[tuple[int, ...]], device: torch.device, captured: bool) -> None:
        width = TILE if self.block_size is None else max(TILE, self.block_size)
        counts = [blocks(line[6], width) for line in lines]
        table = torch.zeros(len(lines), COLUMNS, dtype=torch.int64)
        table[:, :9] = torch.tensor(lines, dtype=torch.int64)
        table[1:, 7] = torch.tensor(counts[:-1]).cumsum(0)
        tiles = torch.arange(len(lines), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
        if captured:
            if self._spare is None or self._spare[1].shape != tiles.shape or self._spare[0].shape != table.shape:
                raise RuntimeError(
                    "AdamW8bit has not stepped these parameters together yet. Fix: take one step before each CUDA graph"
                )
            self._table, self._spare = self._spare, None
            self._unsent.append(((table, tiles), self._table))
            self._captured.append(self._table)
        else:
            here = [_pinned(t, device).to(device, non_blocking=True) for t in (table, tiles)]
            self._table = here[0], here[1]
            self._spare = torch.zeros_like(here[0]), torch.zeros_like(here[1])
        self._known = lines


def _pinned(t: Tensor, device: torch.device) -> Tensor:
    return t.pin_memory() if device.type == "cuda" else t


def _line(entry: Entry) -> tuple[int, ...]:
    """Its line of the table, but for the first tile."""
    addresses = [t.data_ptr() for t in (entry.param, entry.grad, *entry.states)]
    return (*addresses, *[0] * (6 - len(addresses)), entry.param.numel(), 0, entry.row)
