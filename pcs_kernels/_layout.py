"""How tensors lie in memory: attention's [B, H, N, D], parameters, the same for every backend."""

from __future__ import annotations

import torch
from torch import Tensor


def heads_last_empty(x: Tensor) -> Tensor:
    """An empty tensor of x's shape [B, H, N, D] in the memory of [B, N, H, D]: merging its heads is a free view."""
    batch, heads, rows, width = x.shape
    return x.new_empty((batch, rows, heads, width)).transpose(1, 2)


def attention_sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int, int]:
    """(B, H, N, M, D) of q [B, H, N, D] and k [B, H, M, D], as the native attention kernels take them."""
    return (q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3])


def unit_rows(x: Tensor) -> Tensor:
    """x itself where its last dimension is dense, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def image_format(x: Tensor) -> torch.memory_format:
    """The format of what is made from x [B, C, H, W]: channels-last where x or what it is a slice of is, else plain.

    Slices: the gradient of two images joined by `torch.cat` comes as two slices of its channels.
    """
    channels_last = x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def weight_format(weight: Tensor) -> torch.memory_format:
    """The format in which a frozen weight is multiplied: channels-last for a convolution's [O, C, kh, kw]."""
    return torch.channels_last if weight.dim() == 4 else torch.contiguous_format


def in_memory_order(p: Tensor, t: Tensor) -> Tensor:
    """t with p's dimensions in the order of p's memory: an optimizer's blocks are blocks of memory."""
    channels_last = p.ndim == 4 and not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last)
    return t.permute(0, 2, 3, 1) if channels_last else t


def rows_far_apart(x: Tensor) -> bool:
    """Whether the rows of one head of [B, H, N, D] span 2^31 or more elements, more than the kernels' offsets hold."""
    return x.dim() == 4 and bool(x.shape[2] * abs(x.stride(2)) + x.shape[3] >= 2**31)
