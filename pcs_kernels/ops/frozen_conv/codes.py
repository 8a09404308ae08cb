"""A frozen weight in 8 bits for one product: multiplied as it is where something does so, else expanded for it."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..._direct import TENSORS, changed
from ..._dispatch import Op
from ..int8_weight import Int8Weight, lent_weight


def product_of_codes(op: Op, x: Tensor, weight: Tensor | Int8Weight, backend: str) -> ModuleType | None:
    """What multiplies the codes of a weight without expanding it, where something does."""
    if not isinstance(weight, Int8Weight) or type(x) not in TENSORS or backend not in ("", "native"):
        return None
    # Whoever takes torch's operations in hand sees the registered ones.
    if x.device.type != "cpu" or torch.compiler.is_compiling() or changed():
        return None
    native = op.module("native")
    product: ModuleType | None = None if isinstance(native, str) else native.product_of_codes(x, weight)
    return product


def whole(weight: Tensor | Int8Weight, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor: one in 8 bits until the next is asked for."""
    return lent_weight(weight, dtype) if isinstance(weight, Int8Weight) else weight


def as_matrix(weight: Tensor | Int8Weight) -> Tensor | Int8Weight:
    """[O, C] of a linear layer's weight or a 1x1 convolution's."""
    if not isinstance(weight, Int8Weight):
        return weight.flatten(1)
    codes = weight.codes
    single = isinstance(codes, Tensor) and codes.dim() == 4 and codes.shape[2:].numel() == 1
    return Int8Weight(codes.flatten(1), weight.scales) if single else weight  # others are refused by their shape
