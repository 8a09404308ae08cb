"""8-bit weights on the CPU: csrc/int8_weight.cpp."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ... import _native
from ..._layout import weight_format
from .reference import BLOCK, as_shaped

LIBRARY = _native.library()
_own = threading.local()  # a thread's `buffer`: as large as the largest weight that it has expanded


def reason(x: Tensor) -> str | None:
    return _native.reason(x)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.contiguous(memory_format=weight_format(weight))
    outs, inputs = weight.shape[0], weight[0].numel()
    codes = torch.empty_like(weight, dtype=torch.int8, memory_format=weight_format(weight))
    scales = torch.empty((outs, -(-inputs // BLOCK)), dtype=torch.int16)
    LIBRARY.int8_quantize(
        _native.dtype_code(weight),
        _native.address(weight),
        _native.address(codes),
        _native.address(scales),
        outs,
        inputs,
        _native.threads(),
    )
    return codes, scales


def expand(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return _into(torch.empty_like(codes, dtype=dtype, memory_format=weight_format(codes)), codes, scales)


def lend(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`expand` into memory that this thread's next call overwrites: new pages in each call would cost as much again."""
    needed = codes.numel() * dtype.itemsize
    buffer: Tensor | None = getattr(_own, "buffer", None)
    if buffer is None or buffer.numel() < needed:
        _own.buffer = None  # the smaller one goes first
        _own.buffer = buffer = torch.empty(needed, dtype=torch.uint8)
    rows = buffer[:needed].view(dtype).view(codes.shape[0], -1)
    return _into(as_shaped(rows, codes.shape), codes, scales)


def _into(weight: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    scales = scales.contiguous()
    LIBRARY.int8_expand(
        _native.dtype_code(weight),
        _native.address(codes),
        _native.address(scales),
        _native.address(weight),
        codes.shape[0],
        codes[0].numel(),
        _native.threads(),
    )
    return weight
