"""The 8-bit codes of the optimizer states: 256 floats in [-1, 1] (signed) or [0, 1], dense near zero.

Decade i of seven holds the midpoints of an even grid on [0.1, 1] times 10^(i-6): 2^i of them and their negatives in
the signed map, 2^(i+1) in the unsigned one; 0 and 1 complete either. This is bitsandbytes' "dynamic" map, value for
value, so that states move between the two.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

DECADES = 7  # as in bitsandbytes: the two maps then hold exactly 256 values


@functools.cache
def code_map(signed: bool) -> Tensor:
    """The sorted float32 map [256] on the CPU."""
    values = [0.0, 1.0]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float32)
        middles = (10 ** (decade - DECADES + 1)) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def device_map(signed: bool, device: torch.device) -> Tensor:
    """The map on a device: one tensor for all parameters there."""
    return code_map(signed).to(device)


@functools.cache
def search_tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(bounds float32 [256], first uint8 [65536]): how a value in [-1, 1] finds its code in two look-ups.

    The code is the number of bounds, the middles between neighbours of the map, below the value. Values that share the
    upper 16 bits of their float32, 128 to an octave, have at most one bound among them: the code is `first` of these
    bits, and one more where bounds[first] is below the value too. What is on no map, as NaN, gets the last code.
    """
    values = code_map(signed)
    middles = (values[1:] + values[:-1]) / 2  # [255]
    bounds = torch.cat([middles, torch.tensor([float("inf")])])  # [256]
    upper = torch.arange(65536)
    least = (upper << 16) | torch.where(upper >= 32768, 0xFFFF, 0)  # of a negative bucket the largest magnitude
    least = torch.where(least >= 2**31, least - 2**32, least).to(torch.int32).view(torch.float32)  # [65536]
    first = torch.where(least.isnan(), 255, torch.bucketize(least, middles)).to(torch.uint8)
    return bounds.to(device), first.to(device)


_compared = WeakIdKeyDictionary()  # tables of others: whether they are the dynamic map


def is_dynamic(qmap: Tensor, signed: bool) -> bool:
    """Whether qmap is the dynamic map: known of this module's own; any other tensor is read from its device once."""
    if qmap is device_map(signed, qmap.device):
        return True
    known = _compared.get(qmap)
    if known is None:
        known = qmap.device.type == "meta" or torch.equal(qmap.cpu(), code_map(signed))
        _compared[qmap] = known
    return bool(known)


def blocks(n: int, block_size: int) -> int:
    """How many blocks n elements make."""
    return -(-n // block_size)


def decode(state: Tensor, absmax: Tensor, qmap: Tensor, block_size: int) -> Tensor:
    """float32 values of a coded state, flat [n]."""
    scale = absmax.repeat_interleave(block_size)[: state.numel()]  # [n]
    return qmap[state.flatten().long()] * scale  # [n]


def encode(values: Tensor, qmap: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(codes u8 [n], absmax [blocks]) of flat float32 values: the code nearest to value / absmax of its block."""
    n = values.numel()
    padded = torch.nn.functional.pad(values, (0, -n % block_size)).view(-1, block_size)  # [blocks, block_size]
    absmax = padded.abs().amax(dim=1)  # [blocks]
    scaled = (padded / torch.where(absmax > 0, absmax, 1.0)[:, None]).flatten()[:n]  # [n]
    middles = (qmap[1:] + qmap[:-1]) / 2  # [255]
    return torch.bucketize(scaled, middles).to(torch.uint8), absmax  # [n], [blocks]
