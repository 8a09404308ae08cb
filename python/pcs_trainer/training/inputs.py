"""What a step reads from the host: brought to the device all at once, and by nothing else of the step.

Letters: B examples, C latent channels, h x w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..model.text import Reading, Said, Text


@dataclass
class Inputs:
    """A micro-batch as the device reads it."""

    latents: Tensor  # [B, C, h, w]
    noise: Tensor  # [B, C, h, w]
    t: Tensor  # [B]
    masks: Tensor | None  # [B, 1, h, w]
    small: Tensor | None  # [B, 3, h, w], what an up-scaler reads
    text: Text | Reading  # frozen states, or what the text encoders read
    rows: Tensor | None  # [B] the row of what they read that each example has
    own: Tensor | None  # the number of the class prompt of each example that is held to the base's prediction
    side: Any  # what the method's further loss reads
    subjects: int  # the first so many examples are of the subject


PARTS = (Inputs, Text, Reading, Said)


def mapped(change: Callable[[Tensor], Tensor], part: Any) -> Any:
    """The same structure with every tensor that the device reads changed."""
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, (list, tuple)):
        return type(part)(mapped(change, one) for one in part)
    if isinstance(part, dict):
        return {name: mapped(change, one) for name, one in part.items()}
    if isinstance(part, PARTS):
        return replace(part, **{f.name: mapped(change, getattr(part, f.name)) for f in fields(part)})
    return part


def tensors(part: Any) -> Iterator[Tensor]:
    """Every tensor of it, always in the same order."""
    found: list[Tensor] = []
    mapped(lambda x: found.append(x) or x, part)  # type: ignore[func-returns-value]
    return iter(found)


def on_device(part: Any, device: torch.device) -> Any:
    """The same on a device; from pinned memory to a GPU, as any other copy would first wait for all of its work."""

    def moved(x: Tensor) -> Tensor:
        if x.device == device or device.type != "cuda":
            return x.to(device)
        return x.pin_memory().to(device, non_blocking=True)

    return mapped(moved, part)
