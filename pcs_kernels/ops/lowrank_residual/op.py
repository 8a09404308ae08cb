"""lowrank_residual: a projection with a masked low-rank residual, the layer of Personalized Residuals and of LoRA.

    y = x W^T + b + mask * scale * (x down^T) up^T

x [..., C_in]; weight [C_out, C_in] or [C_out, C_in, 1, 1]; bias [C_out]; down [R, C_in], up [C_out, R];
mask of shape x.shape[:-1].
Many concepts on one frozen weight: down [K, R, C_in], up [K, C_out, R], index [B] says which one sample b of x takes.
Kept for the backward: x where down, up, weight or mask take a gradient, else nothing but the weights. A weight in 8
bits, or one that is streamed, is made for each direction, and not packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _check as check
from ..._dispatch import Op, define, forced_backend
from ...streaming import StreamedWeight, lent, parts_of
from ..int8_weight import Int8Weight

OP = Op("lowrank_residual", __package__)


class Needs(NamedTuple):
    """Which gradients a backward must compute."""

    x: bool
    weight: bool
    bias: bool
    down: bool
    up: bool
    mask: bool


def _check_call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
) -> None:
    check.floating("x", x)
    check.require(x.dim() >= 2, lambda: f"x must be [..., C_in] with at least two dimensions, not {tuple(x.shape)}")
    check.not_empty("x", x)
    check.floating("weight", weight)
    check.rank("weight", weight, 2, "[C_out, C_in] or [C_out, C_in, 1, 1]")
    check.not_empty("weight", weight)
    c_out, c_in = weight.shape
    check.require(
        x.shape[-1] == c_in, lambda: f"x has {x.shape[-1]} channels last but weight takes {c_in}: {tuple(weight.shape)}"
    )
    check.same("weight", weight, "x", x)
    if bias is not None:
        check.floating("bias", bias)
        check.shape("bias", bias, (c_out,), "[C_out]")
        check.same("bias", bias, "x", x)
    for name, p in (("down", down), ("up", up)):
        check.floating(name, p)
        check.rank(name, p, 2 if index is None else 3, "[R, C]" if index is None else "[K, R, C] when index is given")
        check.dtype_in(name, p, (x.dtype, torch.float32))
        check.same_device(name, p, "x", x)
        check.not_empty(name, p)
    rank = down.shape[-2]
    stack = () if index is None else (down.shape[0],)
    check.shape("down", down, (*stack, rank, c_in), "[R, C_in]" if index is None else "[K, R, C_in]")
    check.shape("up", up, (*stack, c_out, rank), "[C_out, R]" if index is None else "[K, C_out, R]")
    check.finite("scale", scale)
    if mask is not None:
        check.floating("mask", mask)
        check.shape("mask", mask, tuple(x.shape[:-1]), "x.shape[:-1]")
        check.same_device("mask", mask, "x", x)
    if index is not None:
        check.tensor("index", index)
        check.dtype_in("index", index, (torch.int64,))
        check.dense("index", index)
        check.shape("index", index, (x.shape[0],), "[B]")
        check.same_device("index", index, "x", x)


def _check_index(index: Tensor | None, concepts: int) -> None:
    """Reads the values, so only real calls run it; not while a CUDA graph is captured, where reading is impossible."""
    if index is None or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    low, high = int(index.min()), int(index.max())
    check.require_index(
        low >= 0 and high < concepts,
        lambda: f"index holds {low if low < 0 else high}, outside the {concepts} concepts of down and up",
    )


def _choose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
    pack: bool,
    backend: str,
) -> Any:
    _check_call(x, weight, bias, down, up, mask, scale, index)
    return OP.select(backend, x.device.type, x, weight, bias, down, up, mask, scale, index)


def _forward(chosen: Any, *args: Any) -> Tensor:
    _, _, _, down, _, _, _, index, _, _ = args
    _check_index(index, down.shape[0])
    return chosen.forward(*args[:9])


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
    pack: bool,
    backend: str,
) -> Tensor:
    _check_call(x, weight, bias, down, up, mask, scale, index)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _choose_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_down: bool,
    need_up: bool,
    need_mask: bool,
    pack: bool,
    backend: str,
) -> Any:
    return OP.select(backend, dy.device.type, dy, weight, None, down, up, mask, scale, index)


def _backward(chosen: Any, *args: Any) -> tuple[Tensor, ...]:
    return chosen.backward(*args[:8], Needs(*args[8:14]), args[14])


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    index: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_down: bool,
    need_up: bool,
    need_mask: bool,
    pack: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    needs = Needs(need_x, need_weight, need_bias, need_down, need_up, need_mask)

    def gradient(needed: bool, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return dy.new_empty(shape if needed else (0,), dtype=dtype if needed else dy.dtype)

    dmask = dy.new_empty(0) if mask is None else gradient(needs.mask, mask.shape, mask.dtype)
    return (
        gradient(needs.x, (*dy.shape[:-1], weight.shape[1]), dy.dtype),
        gradient(needs.weight, weight.shape, dy.dtype),
        gradient(needs.bias, (weight.shape[0],), dy.dtype),
        gradient(needs.down, down.shape, down.dtype),
        gradient(needs.up, up.shape, up.dtype),
        dmask,
    )


def _flops(x: Tensor, result: Tensor) -> int:
    """The projection alone: its low-rank part is a few percent of it."""
    return 2 * result.numel() * x.shape[-1]


def _backward_flops(dy: Tensor, weight: Tensor) -> int:
    return 2 * dy.numel() * weight.shape[1]


def _packed_bytes(weight: Tensor) -> int:
    native = OP.module("native")
    return weight.nbytes if isinstance(native, str) else int(native.packed_bytes(weight))


_FORWARD = define(
    "lowrank_residual_forward(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor? mask,"
    " float scale, Tensor? index, bool pack, str backend) -> Tensor",
    _forward,
    _forward_fake,
    _flops,
    packed="weight",
    packed_bytes=_packed_bytes,
    choose=_choose,
)
_BACKWARD = define(
    "lowrank_residual_backward(Tensor dy, Tensor? x, Tensor weight, Tensor down, Tensor up, Tensor? mask, float scale,"
    " Tensor? index, bool need_x, bool need_weight, bool need_bias, bool need_down, bool need_up, bool need_mask,"
    " bool pack, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _backward_flops,
    packed="weight",
    packed_bytes=_packed_bytes,
    choose=_choose_backward,
)


class _LowrankResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        mask: Tensor | None,
        scale: float,
        index: Tensor | None,
        scales: Tensor | None,
        source: StreamedWeight | None,
        backend: str,
    ) -> Tensor:
        _, need_weight, _, need_down, need_up, need_mask = ctx.needs_input_grad[:6]
        keeps_x = need_weight or need_down or need_up or need_mask
        ctx.save_for_backward(x if keeps_x else None, weight, down, up, mask, index, scales)
        ctx.settings = scale, source, backend
        weight, pack = _whole(weight, scales, source, x)
        return _FORWARD(x, weight, bias, down, up, mask, scale, index, pack, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, mask, index, scales = ctx.saved_tensors
        scale, source, backend = ctx.settings
        need = ctx.needs_input_grad[:6]
        weight, pack = _whole(weight, scales, source, dy)
        gradients = _BACKWARD(dy, x, weight, down, up, mask, scale, index, *need, pack, backend)
        return (*(g if n else None for g, n in zip(gradients, need, strict=True)), None, None, None, None, None)


def _whole(
    weight: Tensor | None, scales: Tensor | None, source: StreamedWeight | None, x: Tensor
) -> tuple[Tensor, bool]:
    """The weight itself, or what is lent of it, and whether a packed copy of it may be kept."""
    if weight is not None and scales is None:
        return weight, True
    return lent((weight, scales, source), x.dtype).flatten(1), False


def lowrank_residual(
    x: Tensor,
    weight: Tensor | Int8Weight | StreamedWeight,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None = None,
    scale: float = 1.0,
    index: Tensor | None = None,
) -> Tensor:
    """A projection with a masked low-rank residual: x W^T + bias + mask * scale * (x down^T) up^T, differentiable.

    Args:
        x: [..., C_in].
        weight: [C_out, C_in], or [C_out, C_in, 1, 1] of a 1x1 convolution; a frozen one may be an
            `Int8Weight` or a `StreamedWeight`.
        bias: [C_out] or None.
        down: [R, C_in]; with `index` a stack [K, R, C_in].
        up: [C_out, R]; with `index` a stack [K, C_out, R].
        mask: weights of the residual, of x's shape without its last dimension; default: 1 everywhere.
        scale: of the residual.
        index: int64 [B], the adapter of the stack that each sample of x takes; default: one adapter for all.

    Returns:
        [..., C_out].
    """
    if isinstance(weight, (Int8Weight, StreamedWeight)):
        check.floating("x", x)
    else:
        check.tensor("weight", weight)
    shape = (weight.codes if isinstance(weight, Int8Weight) else weight).shape
    codes, scales, source = parts_of(weight)
    if len(shape) == 4:
        check.require(shape[2:] == (1, 1), lambda: f"weight must be a 1x1 convolution, not {tuple(shape)}")
        codes = None if codes is None else codes.flatten(1)
    rest = (bias, down, up, mask, check.number("scale", scale), index)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, codes, *rest)):
        return _LowrankResidual.apply(x, codes, *rest, scales, source, forced_backend())
    weight, pack = _whole(codes, scales, source, x)
    return _FORWARD(x, weight, *rest, pack, forced_backend())
