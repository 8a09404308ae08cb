"""frozen_conv2d and frozen_linear: products with a frozen weight; nothing is kept for the backward but that weight.

conv: x [B,C,H,W], weight [O,C,kh,kw] -> [B,O,H',W'], channels-last where x is.  linear: x [..., C], weight [O,C].
On the CPU the weight is packed once for each direction and kept beside it; pack=False saves that memory.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ... import _check as check
from ..._dispatch import Op, define, forced_backend
from ..._packed import may_pack

# cuDNN and cuBLAS have the fastest convolutions and products on a GPU: our Triton kernel runs only where it is forced.
OP = Op("frozen_conv", __package__, order={"cuda": ("reference",), "cpu": ("native", "reference")})


def _check_weights(x: Tensor, weight: Tensor, bias: Tensor | None, dims: int, letters: str) -> None:
    check.floating("x", x)
    check.not_empty("x", x)
    check.floating("weight", weight)
    check.rank("weight", weight, dims, letters)
    check.not_empty("weight", weight)
    check.same("weight", weight, "x", x)
    if bias is not None:
        check.floating("bias", bias)
        check.shape("bias", bias, (weight.shape[0],), "[O]")
        check.same("bias", bias, "x", x)


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> None:
    _check_weights(x, weight, bias, 4, "[O, C, kh, kw]")
    check.rank("x", x, 4, "[B, C, H, W]")
    check.require(
        x.shape[1] == weight.shape[1],
        lambda: f"x has {x.shape[1]} channels but weight takes {weight.shape[1]}: {tuple(weight.shape)}",
    )
    check.require(stride >= 1, lambda: f"stride must be at least 1, not {stride}")
    largest = max(weight.shape[2:])
    check.require(0 <= padding <= largest, lambda: f"padding must be from 0 to the kernel's {largest}, not {padding}")
    for letter, size, kernel in (("H", x.shape[2], weight.shape[2]), ("W", x.shape[3], weight.shape[3])):
        check.require(
            size + 2 * padding >= kernel,
            lambda: f"x is smaller than the kernel of weight: {letter} = {size} + 2 x {padding} < {kernel}",
        )


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_weights(x, weight, bias, 2, "[O, C]")
    check.require(x.dim() >= 1, lambda: "x must be [..., C], not a scalar")
    check.require(
        x.shape[-1] == weight.shape[1],
        lambda: f"x has {x.shape[-1]} channels last but weight takes {weight.shape[1]}: {tuple(weight.shape)}",
    )


def _format(x: Tensor) -> torch.memory_format:
    """Channels-last tensors stay so; what is plainly contiguous (or ambiguous) stays contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, pack: bool, backend: str
) -> Tensor:
    _check_conv(x, weight, bias, stride, padding)
    implementation = OP.select(backend, x.device.type, x, weight)
    y = implementation.forward_conv(x, weight, bias, stride, padding, pack)
    return y.contiguous(memory_format=_format(x))


def _conv_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, pack: bool, backend: str
) -> Tensor:
    _check_conv(x, weight, bias, stride, padding)
    height = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
    width = (x.shape[3] + 2 * padding - weight.shape[3]) // stride + 1
    size = (x.shape[0], weight.shape[0], height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_format(x))


def _conv_backward(
    dy: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: int, pack: bool, backend: str
) -> Tensor:
    implementation = OP.select(backend, dy.device.type, dy, weight)
    dx = implementation.backward_conv(dy, weight, height, width, stride, padding, pack)
    return dx.contiguous(memory_format=_format(dy))


def _conv_backward_fake(
    dy: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: int, pack: bool, backend: str
) -> Tensor:
    size = (dy.shape[0], weight.shape[1], height, width)
    return torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=_format(dy))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, pack: bool, backend: str) -> Tensor:
    _check_linear(x, weight, bias)
    return OP.select(backend, x.device.type, x, weight).forward_linear(x, weight, bias, pack).contiguous()


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, pack: bool, backend: str) -> Tensor:
    _check_linear(x, weight, bias)
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


define(
    "frozen_conv2d_forward(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, bool pack, str backend)"
    " -> Tensor",
    _conv,
    _conv_fake,
    _conv_flops,
    packed="weight",
)
define(
    "frozen_conv2d_backward(Tensor dy, Tensor weight, int height, int width, int stride, int padding, bool pack,"
    " str backend) -> Tensor",
    _conv_backward,
    _conv_backward_fake,
    _conv_backward_flops,
    packed="weight",
)
define(
    "frozen_linear_forward(Tensor x, Tensor weight, Tensor? bias, bool pack, str backend) -> Tensor",
    _linear,
    _linear_fake,
    _linear_flops,
    packed="weight",
)
define(
    "frozen_linear_backward(Tensor dy, Tensor weight, bool pack, str backend) -> Tensor",
    _linear_backward,
    _linear_backward_fake,
    _linear_backward_flops,
    packed="weight",
)


class _FrozenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, pack: bool, backend: str
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings = x.shape[2], x.shape[3], stride, padding, pack and may_pack("backward"), backend
        pack = pack and may_pack("forward")
        return torch.ops.pcs_kernels.frozen_conv2d_forward(x, weight, bias, stride, padding, pack, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dx = torch.ops.pcs_kernels.frozen_conv2d_backward(dy, weight, *ctx.settings)
        return dx, None, None, None, None, None, None


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


def _must_be_frozen(function: str, instead: str, **parameters: Tensor | None) -> None:
    for name, p in parameters.items():
        check.require(
            not (isinstance(p, Tensor) and p.requires_grad),
            lambda: (
                f"{name} requires a gradient, which {function} never computes. Fix: {name}.requires_grad_(False), "
                f"or {instead} to train it"
            ),
        )


def frozen_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 1, pack: bool = True
) -> Tensor:
    """A convolution with a frozen weight: gradients flow to x, and nothing but the weight is kept for them.

    Args:
        x: [B, C, H, W].
        weight: [O, C, kh, kw]; one that requires a gradient is refused.
        bias: [O] or None, likewise.
        stride: of both sides.
        padding: of both sides, with zeros.
        pack: keep a packed copy of the weight for each direction used (CPU) that `packing` allows; False saves it.

    Returns:
        [B, O, H', W'], channels-last where x is.
    """
    _must_be_frozen("frozen_conv2d", "torch.nn.functional.conv2d", weight=weight, bias=bias)
    if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
        return _FrozenConv2d.apply(x, weight, bias, stride, padding, pack, forced_backend())
    pack = pack and may_pack("forward")
    return torch.ops.pcs_kernels.frozen_conv2d_forward(x, weight, bias, stride, padding, pack, forced_backend())


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, pack: bool = True) -> Tensor:
    """x weight^T + bias with a frozen weight: gradients flow to x, and nothing but the weight is kept for them.

    Args:
        x: [..., C].
        weight: [O, C]; one that requires a gradient is refused.
        bias: [O] or None, likewise.
        pack: keep a packed copy of the weight for each direction used (CPU) that `packing` allows; False saves it.

    Returns:
        [..., O].
    """
    _must_be_frozen("frozen_linear", "torch.nn.functional.linear", weight=weight, bias=bias)
    if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
        return _FrozenLinear.apply(x, weight, bias, pack, forced_backend())
    pack = pack and may_pack("forward")
    return torch.ops.pcs_kernels.frozen_linear_forward(x, weight, bias, pack, forced_backend())
