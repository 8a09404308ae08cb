"""What training in float16 needs: which networks gradients pass through, and their float32 twins for a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..machine import training_dtype
from ..methods.learner import Learner
from ..unet.layers import replace_data


def float16_networks(learner: Learner) -> list[nn.Module]:
    """The networks with float16 weights that gradients pass through: the UNet, text encoders where they matter."""
    networks: list[nn.Module] = [learner.model.unet]
    networks += learner.model.text_encoders if learner.text_trains else []
    return [n for n in networks if any(p.dtype == torch.float16 for p in n.parameters())]


def said_of_float16(scale: float, kind: str) -> str:
    """What a run in float16 begins by saying: how its loss is scaled, and what suits the device where that is another.

    `load_model` keeps a file's float16 on a GPU, as small as it is; the command line asks the machine instead.
    """
    text = f"float16: the loss is scaled by {scale:g}, by less where a gradient overflows"
    dtype, reason = training_dtype(kind)
    if dtype == torch.float16:
        return text
    return f"{text}; {reason}: load_model(..., dtype={dtype}) suits it"


@contextmanager
def in_float32(networks: Sequence[nn.Module]) -> Iterator[None]:
    """The networks with float32 weights; their own wait on the CPU, so a GPU holds one set at a time."""
    own = [(p, p.data) for network in networks for p in network.parameters() if p.dtype == torch.float16]
    places = [p.device for p, _ in own]
    try:
        for i, (p, value) in enumerate(own):
            replace_data(p, value.float())
            own[i] = p, value.cpu()
        yield
    finally:
        for (p, value), place in zip(own, places, strict=True):
            replace_data(p, value)  # the float32 ones leave the GPU first: it may be full
            replace_data(p, value.to(place))
