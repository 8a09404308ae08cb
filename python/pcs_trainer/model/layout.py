"""Convolution weights in the order of memory that a device's library computes in: else every call makes a copy."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from ..unet.layers import replace_data

Network = TypeVar("Network", bound=nn.Module)
# A CPU's weights stay mapped to their file, and its kernels pack them. Apple's graphs take OIHW weights alone and
# gather any other order at each call (torch's mps/operations/Convolution.mm).
PLAIN = ("cpu", "meta", "mps")


def reads_channels_last(device: torch.device | str) -> bool:
    """Whether convolutions of channels-last images read a channels-last weight there without a copy.

    cuDNN and oneDNN (Intel's GPUs) do, and copy a plain one at each call. AMD's MIOpen computes in NCHW, unless an
    environment variable of torch says otherwise, and would copy a channels-last one.
    """
    kind = torch.device(device).type
    return kind not in PLAIN and not (kind == "cuda" and torch.version.hip is not None)


def lay_out(network: Network, device: torch.device | str) -> Network:
    """The network, its convolution weights in the order that the device reads, each replaced before the next is made.

    A 1x1 weight is the same bytes in both orders, and is contiguous in either by torch's own test.
    """
    if reads_channels_last(device):
        for p in network.parameters():
            if p.dim() == 4 and p.shape[2:].numel() > 1:
                replace_data(p, p.data.contiguous(memory_format=torch.channels_last))
    return network
