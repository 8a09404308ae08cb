"""Somebody else's frozen network on our products: for bfloat16 on CPUs, where torch's may lack the instructions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import pcs_kernels


def on_our_products(network: nn.Module) -> AbstractContextManager[Any]:
    """Inside, a network without gradients multiplies on `frozen_conv2d` and `frozen_linear`, if that can be faster.

    No copy of its weights is kept. On a CPU that multiplies bfloat16 these two are torch's own functions.
    """
    p = next(network.parameters())
    return _OnOurProducts() if p.device.type == "cpu" and p.dtype is torch.bfloat16 else nullcontext()


class _OnOurProducts(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            if func is F.linear and not kwargs and _takes(2, *args):
                x, weight, *bias = args
                return pcs_kernels.frozen_linear(x, weight.detach(), _frozen(*bias), pack=False)
            numbers = _square(args[1], *args[3:]) if func is F.conv2d and not kwargs and _takes(4, *args) else None
            if numbers is not None:
                return pcs_kernels.frozen_conv2d(args[0], args[1].detach(), _frozen(*args[2:3]), *numbers, pack=False)
        return func(*args, **kwargs)


def _takes(dims: int, x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any) -> bool:
    """Whether this is a product of bfloat16 tensors on the CPU, in shapes that our ops have."""
    given = (x, weight) if bias is None else (x, weight, bias)
    if not all(t.dtype is torch.bfloat16 and t.device.type == "cpu" and t.numel() for t in given):
        return False
    shaped = x.dim() == weight.dim() == dims if dims == 4 else weight.dim() == dims and x.dim() > 0
    channels = 1 if dims == 4 else -1
    return shaped and x.shape[channels] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])


def _frozen(bias: Tensor | None = None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _square(
    weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[int, int] | None:
    """(stride, padding) of a convolution that `frozen_conv2d` has, else None."""
    sides = [(n, n) if isinstance(n, int) else n for n in (stride, padding, dilation)]
    if groups != 1 or any(isinstance(n, str) or n[0] != n[-1] for n in sides) or sides[2][0] != 1:
        return None
    if sides[1][0] > max(weight.shape[2:]):
        return None
    return int(sides[0][0]), int(sides[1][0])
