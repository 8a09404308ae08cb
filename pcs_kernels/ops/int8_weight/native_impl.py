"""8-bit weights on the CPU: csrc/int8_weight.cpp."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ... import _native
from .reference import BLOCK

LIBRARY = _native.library()
_own = threading.local()  # a thread's `buffer`: as large as the largest weight that it has expanded


def reason(x: Tensor) -> str | None:
    return _native.reason(x)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    order = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype, memory_format=order)


def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Those of codes: convolutions channels-last."""
    if len(shape) == 2:
        return shape[1], 1
    _, ins, height, width = shape
    return ins * height * width, 1, width * ins, ins


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.contiguous(memory_format=torch.channels_last if weight.dim() == 4 else torch.contiguous_format)
    outs, inputs = weight.shape[0], weight[0].numel()
    codes, scales = _like(weight, torch.int8), torch.empty((outs, -(-inputs // BLOCK)), dtype=torch.int16)
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
    return _into(_like(codes, dtype), codes, scales)


def lend(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`expand` into memory that this thread's next call overwrites: new pages in each call would cost as much again."""
    needed = codes.numel() * dtype.itemsize
    buffer: Tensor | None = getattr(_own, "buffer", None)
    if buffer is None or buffer.numel() < needed:
        _own.buffer = None  # the smaller one goes first
        _own.buffer = buffer = torch.empty(needed, dtype=torch.uint8)
    weight = buffer[:needed].view(dtype).as_strided(codes.shape, _strides(codes.shape))
    return _into(weight, codes, scales)


def give_back() -> None:
    """Free this thread's memory of `lend`."""
    _own.buffer = None


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
