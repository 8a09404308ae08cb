"""8-bit weights in pure torch: code = round(w / scale), scale = max |w| / 127 of 64 inputs, rounded up to bfloat16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
AT_ONCE = 2**20  # values that are quantized together: what is made on the way takes 16 bytes of each


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    ordered = _in_order(weight)
    parts = ordered.split(max(1, AT_ONCE // ordered[0].numel()))
    codes, scales = zip(*(_quantized(part.flatten(1)) for part in parts), strict=True)
    return as_shaped(torch.cat(codes), weight.shape), torch.cat(scales)


def _quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows [O, K]."""
    blocks = F.pad(rows.float(), (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))  # [O, K / 64, 64]
    scales = _round_up(blocks.abs().amax(-1) / 127)  # [O, K / 64]
    divisor = values_of(scales)[..., None]
    codes = torch.where(divisor == 0, 0.0, blocks / divisor).round().to(torch.int8)
    return codes.flatten(1)[:, : rows.shape[1]], scales  # [O, K]


def expand(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    rows = _in_order(codes).flatten(1)  # [O, K]
    wide = torch.promote_types(dtype, torch.float32)
    spread = values_of(scales).repeat_interleave(BLOCK, dim=1)[:, : rows.shape[1]]  # [O, K]
    return as_shaped((rows.to(wide) * spread.to(wide)).to(dtype), codes.shape)


def values_of(scales: Tensor) -> Tensor:
    """The float32 values of scales kept as the bits of bfloat16."""
    return scales.view(torch.bfloat16).float()


def _round_up(positive: Tensor) -> Tensor:
    """The bits of the bfloat16 that is no smaller: the largest code is then at most 127."""
    return ((positive.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16)


def _in_order(weight: Tensor) -> Tensor:
    """[O, C, kh, kw] -> [O, kh, kw, C]."""
    return weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight


def as_shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    """[O, K] -> [O, C] or, channels-last, [O, C, kh, kw]."""
    if len(shape) == 2:
        return rows
    outs, ins, height, width = shape
    return rows.reshape(outs, height, width, ins).permute(0, 3, 1, 2)
