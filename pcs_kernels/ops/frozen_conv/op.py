"""frozen_conv2d and frozen_linear: products with a frozen weight; nothing is kept for the backward but that weight.

conv: x [B,C,H,W], weight [O,C,kh,kw] -> [B,O,H',W'], channels-last where x is.  linear: x [..., C], weight [O,C].
The CPU packs a weight once for each direction (not with pack=False), or reads it as it lies; elsewhere torch's own
functions run, without a copy where all is channels-last. 8 bits are expanded for a product, or multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _check as check
from ..._dispatch import Op, autocast_is_on, define, forced_backend, without_autocast
from ..._layout import image_format
from ..._packed import may_pack
from ...streaming import FrozenWeight, StreamedWeight, keep, kept, parts_of, taken
from ..int8_weight import Int8Weight
from . import reference
from .checks import check_conv, check_linear
from .codes import as_matrix, product_of_codes, whole

# Off the CPU the registered ops are left out unless a backend is forced: a batch of 1 waits for the host there.
# cuDNN and cuBLAS have the fastest convolutions and products on a GPU: our Triton kernel runs only where it is forced.
OP = Op("frozen_conv", __package__, order={"cuda": ("reference",), "cpu": ("native", "reference")})


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, pack: bool, backend: str
) -> Tensor:
    check_conv(x, weight, bias, stride, padding)
    implementation = OP.select(backend, x.device.type, x, weight)
    y = implementation.forward_conv(x, weight, bias, stride, padding, pack)
    return y.contiguous(memory_format=image_format(x))


def _conv_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, pack: bool, backend: str
) -> Tensor:
    check_conv(x, weight, bias, stride, padding)
    height = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
    width = (x.shape[3] + 2 * padding - weight.shape[3]) // stride + 1
    size = (x.shape[0], weight.shape[0], height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=image_format(x))


def _conv_backward(
    dy: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: int, pack: bool, backend: str
) -> Tensor:
    implementation = OP.select(backend, dy.device.type, dy, weight)
    dx = implementation.backward_conv(dy, weight, height, width, stride, padding, pack)
    return dx.contiguous(memory_format=image_format(dy))


def _conv_backward_fake(
    dy: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: int, pack: bool, backend: str
) -> Tensor:
    size = (dy.shape[0], weight.shape[1], height, width)
    return torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=image_format(dy))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, pack: bool, backend: str) -> Tensor:
    check_linear(x, weight, bias)
    return OP.select(backend, x.device.type, x, weight).forward_linear(x, weight, bias, pack).contiguous()


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, pack: bool, backend: str) -> Tensor:
    check_linear(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_backward(dy: Tensor, weight: Tensor, pack: bool, backend: str) -> Tensor:
    return OP.select(backend, dy.device.type, dy, weight).backward_linear(dy, weight, pack).contiguous()


def _linear_backward_fake(dy: Tensor, weight: Tensor, pack: bool, backend: str) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], weight.shape[1]))


def _conv_flops(weight: Tensor, result: Tensor) -> int:
    return 2 * result.numel() * prod(weight.shape[1:])


def _conv_backward_flops(dy: Tensor, weight: Tensor) -> int:
    return 2 * dy.numel() * prod(weight.shape[1:])


def _linear_flops(x: Tensor, result: Tensor) -> int:
    return 2 * result.numel() * x.shape[-1]


def _linear_backward_flops(dy: Tensor, result: Tensor) -> int:
    return 2 * result.numel() * dy.shape[-1]


def _packed_bytes(weight: Tensor) -> int:
    native = OP.module("native")
    return weight.nbytes if isinstance(native, str) or native.packs(weight) else 0


define(
    "frozen_conv2d_forward(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, bool pack, str backend)"
    " -> Tensor",
    _conv,
    _conv_fake,
    _conv_flops,
    packed="weight",
    packed_bytes=_packed_bytes,
)
define(
    "frozen_conv2d_backward(Tensor dy, Tensor weight, int height, int width, int stride, int padding, bool pack,"
    " str backend) -> Tensor",
    _conv_backward,
    _conv_backward_fake,
    _conv_backward_flops,
    packed="weight",
    packed_bytes=_packed_bytes,
)
define(
    "frozen_linear_forward(Tensor x, Tensor weight, Tensor? bias, bool pack, str backend) -> Tensor",
    _linear,
    _linear_fake,
    _linear_flops,
    packed="weight",
    packed_bytes=_packed_bytes,
)
define(
    "frozen_linear_backward(Tensor dy, Tensor weight, bool pack, str backend) -> Tensor",
    _linear_backward,
    _linear_backward_fake,
    _linear_backward_flops,
    packed="weight",
    packed_bytes=_packed_bytes,
)


def _torch_alone(x: object) -> bool:
    """Whether torch's own function is all that can run, so that the call needs no registered op around it.

    Not where autocast is on, which would change its dtype, nor while a graph is compiled, which takes an op as it is.
    """
    elsewhere = isinstance(x, Tensor) and x.device.type != "cpu"
    return elsewhere and not (forced_backend() or autocast_is_on() or torch.compiler.is_compiling())


def _ordered(dy: Tensor, order: torch.memory_format) -> Tensor:
    """dy in the order of x, which dx then has too: a loss's few channels cost less to copy than what they come from."""
    return dy if image_format(dy) == order else dy.contiguous(memory_format=order)


class _FrozenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, pack: bool, backend: str
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings = x.shape[2], x.shape[3], stride, padding, pack and may_pack("backward"), backend
        ctx.order = image_format(x)
        pack = pack and may_pack("forward")
        return torch.ops.pcs_kernels.frozen_conv2d_forward(x, weight, bias, stride, padding, pack, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dx = torch.ops.pcs_kernels.frozen_conv2d_backward(_ordered(dy, ctx.order), weight, *ctx.settings)
        return dx, None, None, None, None, None, None


def _lent_conv(x: Tensor, parts: Sequence[Any], bias: Tensor | None, stride: int, padding: int) -> Tensor:
    weight = taken(parts)
    product = product_of_codes(OP, x, weight, forced_backend())
    if product is not None:
        check_conv(x, weight, bias, stride, padding)
        made: Tensor = product.forward_conv(x, weight, bias, stride, padding)
        return made
    return frozen_conv2d(x, whole(weight, x.dtype), bias, stride, padding, pack=False)


def _lent_linear(x: Tensor, parts: Sequence[Any], bias: Tensor | None) -> Tensor:
    weight = as_matrix(taken(parts))
    product = product_of_codes(OP, x, weight, forced_backend())
    if product is not None:
        check_linear(x, weight, bias)
        made: Tensor = product.forward_linear(x, weight, bias)
        return made
    return frozen_linear(x, whole(weight, x.dtype), bias, pack=False)


class _LentConv2d(torch.autograd.Function):
    """The convolution of a weight that is made for each direction: its codes and scales, or where it lies, are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, stride: int, padding: int, *parts: Any) -> Tensor:
        keep(ctx, parts)
        ctx.numbers = x.shape[2], x.shape[3], stride, padding
        ctx.order, ctx.backend = image_format(x), forced_backend()
        return _lent_conv(x, parts, bias, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        held, dy = taken(kept(ctx)), _ordered(dy, ctx.order)
        product = product_of_codes(OP, dy, held, ctx.backend)
        if product is not None:
            return product.backward_conv(dy, held, *ctx.numbers), None, None, None, None, None, None
        weight = whole(held, dy.dtype)
        if _torch_alone(dy) and not ctx.backend:
            dx = _gradient(dy, weight, *ctx.numbers).contiguous(memory_format=ctx.order)
        else:
            dx = torch.ops.pcs_kernels.frozen_conv2d_backward(dy, weight, *ctx.numbers, False, ctx.backend)
        return dx, None, None, None, None, None, None


class _LentLinear(torch.autograd.Function):
    """The product with such a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
        keep(ctx, parts)
        ctx.backend = forced_backend()
        return _lent_linear(x, parts, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        held = as_matrix(taken(kept(ctx)))
        product = product_of_codes(OP, dy, held, ctx.backend)
        if product is not None:
            return product.backward_linear(dy, held), None, None, None, None
        weight = whole(held, dy.dtype)
        if _torch_alone(dy) and not ctx.backend:
            return reference.backward_linear(dy, weight, False), None, None, None, None
        return torch.ops.pcs_kernels.frozen_linear_backward(dy, weight, False, ctx.backend), None, None, None, None


def _torch_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding).contiguous(memory_format=image_format(x))


class _TorchConv2d(torch.autograd.Function):
    """torch's convolution, whose own gradient would keep x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.numbers = x.shape[2], x.shape[3], stride, padding
        ctx.order = image_format(x)
        return _torch_conv(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dx = _gradient(_ordered(dy, ctx.order), weight, *ctx.numbers)
        return dx.contiguous(memory_format=ctx.order), None, None, None, None


_gradient = without_autocast(reference.transposed)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pack: bool, backend: str) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings = pack and may_pack("backward"), backend
        pack = pack and may_pack("forward")
        return torch.ops.pcs_kernels.frozen_linear_forward(x, weight, bias, pack, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return torch.ops.pcs_kernels.frozen_linear_backward(dy, weight, *ctx.settings), None, None, None, None


def _must_be_frozen(function: str, instead: str, **parameters: FrozenWeight | None) -> None:
    for name, p in parameters.items():
        p = p.sources[0] if isinstance(p, StreamedWeight) else p
        check.require(
            not (isinstance(p, Tensor) and p.requires_grad),
            lambda: (
                f"{name} requires a gradient, which {function} never computes. Fix: {name}.requires_grad_(False), "
                f"or {instead} to train it"
            ),
        )


def frozen_conv2d(
    x: Tensor,
    weight: Tensor | Int8Weight | StreamedWeight,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    pack: bool = True,
) -> Tensor:
    """A convolution with a frozen weight: gradients flow to x, and nothing but the weight is kept for them.

    Args:
        x: [B, C, H, W].
        weight: [O, C, kh, kw], its `Int8Weight` or `StreamedWeight`; one that requires a gradient is refused.
        bias: [O] or None, likewise.
        stride: of both sides.
        padding: of both sides, with zeros.
        pack: keep a packed copy of the weight for each direction used (CPU) that `packing` allows; False saves it.

    Returns:
        [B, O, H', W'], channels-last where x is.
    """
    if isinstance(weight, (Int8Weight, StreamedWeight)):
        _must_be_frozen("frozen_conv2d", "torch.nn.functional.conv2d", weight=weight, bias=bias)
        check.floating("x", x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _LentConv2d.apply(x, bias, stride, padding, *parts_of(weight))
        return _lent_conv(x, parts_of(weight), bias, stride, padding)
    _must_be_frozen("frozen_conv2d", "torch.nn.functional.conv2d", weight=weight, bias=bias)
    if _torch_alone(x) and type(stride) is type(padding) is int:  # the op's schema refuses other types
        check_conv(x, weight, bias, stride, padding)
        keeps = torch.is_grad_enabled() and x.requires_grad
        return (_TorchConv2d.apply if keeps else _torch_conv)(x, weight, bias, stride, padding)
    if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
        return _FrozenConv2d.apply(x, weight, bias, stride, padding, pack, forced_backend())
    pack = pack and may_pack("forward")
    return torch.ops.pcs_kernels.frozen_conv2d_forward(x, weight, bias, stride, padding, pack, forced_backend())


def frozen_linear(
    x: Tensor, weight: Tensor | Int8Weight | StreamedWeight, bias: Tensor | None = None, pack: bool = True
) -> Tensor:
    """x weight^T + bias with a frozen weight: gradients flow to x, and nothing but the weight is kept for them.

    Args:
        x: [..., C].
        weight: [O, C], its `Int8Weight` or `StreamedWeight`; one that requires a gradient is refused.
        bias: [O] or None, likewise.
        pack: keep a packed copy of the weight for each direction used (CPU) that `packing` allows; False saves it.

    Returns:
        [..., O].
    """
    if isinstance(weight, (Int8Weight, StreamedWeight)):
        _must_be_frozen("frozen_linear", "torch.nn.functional.linear", weight=weight, bias=bias)
        check.floating("x", x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _LentLinear.apply(x, bias, *parts_of(weight))
        return _lent_linear(x, parts_of(weight), bias)
    _must_be_frozen("frozen_linear", "torch.nn.functional.linear", weight=weight, bias=bias)
    # torch's product keeps the weight alone where that is all its gradient needs, but for Apple's, which has a backward
    # of its own that keeps x too.
    if _torch_alone(x) and x.device.type != "mps":
        check_linear(x, weight, bias)
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
        return _FrozenLinear.apply(x, weight, bias, pack, forced_backend())
    pack = pack and may_pack("forward")
    return torch.ops.pcs_kernels.frozen_linear_forward(x, weight, bias, pack, forced_backend())
