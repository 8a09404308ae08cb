"""geglu on the CPU: csrc/geglu.cpp."""

from __future__ import annotations

from torch import Tensor

from ... import _native

LIBRARY = _native.library()


def reason(x: Tensor) -> str | None:
    return _native.reason(x)


def forward(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    LIBRARY.geglu_forward(
        _native.dtype_code(x),
        _native.address(x),
        _native.address(y),
        x.numel() // x.shape[-1],
        y.shape[-1],
        _native.threads(),
    )
    return y


def backward(dy: Tensor, x: Tensor) -> Tensor:
    x, dy = x.contiguous(), dy.contiguous()
    dx = x.new_empty(x.shape)
    LIBRARY.geglu_backward(
        _native.dtype_code(x),
        _native.address(dy),
        _native.address(x),
        _native.address(dx),
        x.numel() // x.shape[-1],
        dy.shape[-1],
        _native.threads(),
    )
    return dx
