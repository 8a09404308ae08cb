"""Networks that take turns on a GPU: while one works, the others wait in the machine's memory.

What is frozen keeps its values there while it works, too: going back then moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ..unet.layers import place, replace_data
from ..unet.unet import UNet

NETWORKS = ("unet", "text_encoders", "vae")


class Owner(Protocol):
    """What is asked of a Model."""

    device: str
    turns: Turns

    @property
    def loaded(self) -> list[str]:
        """Names of the parts that are in memory."""

    @property
    def unet(self) -> UNet:
        """The denoising network."""


class Turns:
    """Which networks wait, for one model."""

    def __init__(self) -> None:
        self.on = False
        self.staying = {"unet"}  # on the device whenever it is nobody's turn
        self.now = ""  # whose turn it is
        self._kept: dict[str, list[tuple[nn.Parameter, int, Tensor]]] = {}
        self._aside: list[tuple[nn.Parameter, Tensor]] = []  # the UNet's values while it waits

    def begin(self, on: bool) -> None:
        """Take turns from now on, or no longer; what stayed for a training that is over does so no more."""
        self.on, self.staying = on, {"unet"}
        if not on:
            self._kept.clear()

    def waits(self, part: str) -> bool:
        """Whether a network that is read now is to wait for its turn."""
        return self.on and part not in self.staying and part != self.now

    def forget(self, part: str) -> None:
        """Let go of what a network left in the machine's memory."""
        self._kept.pop(part, None)

    def to_host(self, model: Owner, part: str) -> None:
        """A network's parameters into the machine's memory. Nobody looks at a UNet that waits: it is empty."""
        if part == "unet":
            model.unet.forget_derived()  # views of its weights, which would stay
        kept = {id(p): (version, value) for p, version, value in self._kept.get(part, ())}
        self.forget(part)
        away = {id(p) for p, _ in self._aside}  # where memory ran out on the way back
        streamed = "cpu" if part == "unet" else ""  # what of the UNet is streamed waits already
        for p in (p for p in parameters(model, part) if id(p) not in away and p.device.type != streamed):
            version, value = kept.pop(id(p), (None, None))  # what has changed goes before it is there anew
            value = p.data.cpu() if value is None or version != p._version else value
            if part == "unet":
                self._aside.append((p, value))
                replace_data(p, p.data.new_empty(0))
            else:
                _move(p, value)

    def to_device(self, model: Owner, part: str) -> None:
        """A network's parameters onto the model's device."""
        for module in networks(model, part):
            for one in module.modules():  # buffers are few and small, and stay once they are there
                one._buffers.update({n: b.to(model.device) for n, b in one._buffers.items() if b is not None})
        if part == "unet":
            waiting = self._aside
        else:
            waiting = [(p, p.data) for p in parameters(model, part) if p.device.type == "cpu"]
        kept = self._kept.setdefault(part, []) if self.on else []
        while waiting:  # one that finds no memory there is not lost
            p, value = waiting[-1]
            (replace_data if part == "unet" else _move)(p, value.to(model.device))
            kept.append((p, p._version, value))
            waiting.pop()

    def bring_back(self, model: Owner) -> None:
        """What is on the device when it is nobody's turn, where a turn found no memory to bring it there."""
        for part in NETWORKS:
            if part in self.staying and part in model.loaded:
                self.to_device(model, part)


def _move(p: nn.Parameter, value: Tensor) -> None:
    """The same while it may train; where no tensor can change its kind of device, what trains stays where it is."""
    if not p.requires_grad or torch._has_compatible_shallow_copy_type(p, value):
        place(p, value)


def parameters(model: Owner, part: str) -> list[nn.Parameter]:
    """Those of a network that is loaded."""
    return [p for one in networks(model, part) for p in one.parameters()]


def networks(model: Owner, part: str) -> list[nn.Module]:
    """The modules of a part: one, or the text encoders."""
    network = getattr(model, part)
    return network if isinstance(network, list) else [network]


def is_there(model: Owner, part: str) -> bool:
    """Whether a network is loaded, and on the model's device."""
    return part in model.loaded and next(iter(parameters(model, part))).device.type != "cpu"


@contextmanager
def turn(model: Owner, part: str, alone: bool = False) -> Iterator[None]:
    """While this network works, the others wait, where networks take turns; not while gradients are recorded.

    Args:
        model: whose network.
        part: "text_encoders" or "vae".
        alone: the UNet waits even where networks do not take turns.
    """
    turns = model.turns
    on_host = torch.device(model.device).type in ("cpu", "meta")
    stays = part in turns.staying or turns.now == part
    if on_host or not (turns.on or alone) or torch.is_grad_enabled() or stays:
        yield
        return
    before, turns.now = turns.now, part
    others = [name for name in (NETWORKS if turns.on else ("unet",)) if name != part and is_there(model, name)]
    try:
        for name in others:
            turns.to_host(model, name)
        if part in model.loaded and turns.on:
            turns.to_device(model, part)
        yield
    finally:
        turns.now = before
        if turns.waits(part):
            turns.to_host(model, part)
        for name in others:
            if name in turns.staying or not turns.on:
                turns.to_device(model, name)
