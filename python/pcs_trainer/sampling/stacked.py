"""Batched inference with a different concept per image: low-rank residuals as stacks with an index.

The network runs once for all of them; ranks are padded to the largest with zeros, which change nothing.
Letters: K concepts, R rank, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..concept.grammar import on_unet
from ..unet.layers import Conv2d, Linear, LowRank, device_of
from ..unet.unet import UNet

NOBODY = -1  # an image without concept


def checked_index(
    index: Sequence[int | None] | Tensor | None, pictures: int, concepts: Sequence[Concept]
) -> list[int] | None:
    """The number of each prompt's concept, NOBODY for none; ValueError says what cannot be stacked."""
    if index is None:
        return None
    chosen = [NOBODY if i is None else int(i) for i in index]
    if len(chosen) != pictures:
        raise ValueError(f"index names a concept for {len(chosen)} prompts; there are {pictures}")
    wrong = [i for i in chosen if not NOBODY <= i < len(concepts)]
    if wrong:
        raise ValueError(
            f"index holds {wrong[0]}; with {len(concepts)} concepts it is 0 to {len(concepts) - 1}, or None"
        )
    for concept in concepts:
        whole = next((name for name in concept.wholes() if on_unet(name)), None)
        if whole is not None:
            raise ValueError(
                f"the concept {concept.key!r} ({concept.method}) changes the whole of {whole!r}, so it cannot share a "
                f"batch with others. Fix: sample it in a call of its own"
            )
    return chosen


def text_side(concept: Concept) -> Concept:
    """The concept without what it does to the UNet."""
    return replace(concept, tensors={n: t for n, t in concept.tensors.items() if not on_unet(n)})


def _stack(tensors: Sequence[Tensor | None], shape: tuple[int, int], scales: Sequence[float]) -> Tensor:
    """The tensors in fp32, each scaled and padded with zeros; the last entry, for no concept, is all zeros."""
    stack = torch.zeros(len(tensors) + 1, *shape)  # [K + 1, *shape]
    for row, tensor, scale in zip(stack, tensors, scales, strict=False):
        if tensor is not None:
            row[: tensor.shape[0], : tensor.shape[1]] = tensor.float() * scale
    return stack


@contextmanager
def stacked(unet: UNet, concepts: Sequence[Concept], strengths: Sequence[float]) -> Iterator[list[LowRank]]:
    """Put all concepts' residuals on the UNet as stacks, for as long as the context is open.

    Args:
        unet: the network.
        concepts: whose residuals are stacked, K of them.
        strengths: one per concept.

    Yields:
        The stacks; a batch sets their `index`.
    """
    pairs = [{slot.layer: pair for slot, pair in c.residuals().items() if on_unet(slot.stem)} for c in concepts]
    made: list[tuple[Linear | Conv2d, LowRank]] = []
    try:
        for name in dict.fromkeys(name for own in pairs for name in own):
            both = [own.get(name, (None, None)) for own in pairs]
            downs, ups = [d for d, _ in both], [u for _, u in both]
            rank = max(d.shape[0] for d in downs if d is not None)
            layer = unet.projection(name)
            c_out, c_in = layer.weight.shape[:2]
            down = _stack(downs, (rank, c_in), [1.0] * len(downs)).to(device_of(layer))  # [K + 1, R, C_in]
            up = _stack(ups, (c_out, rank), strengths).to(device_of(layer))  # [K + 1, C_out, R]
            made.append((layer, unet.attach(name, LowRank(down, up))))
        yield [residual for _, residual in made]
    finally:
        for layer, residual in made:
            layer.residuals = [r for r in layer.residuals if r is not residual]
