"""Proof that a run trains: gradients against the reference, what has moved and what not, the file against memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pcs_kernels
from pcs_kernels.optim import LossScale

from ..distributed import full_value
from ..errors import NotTrained
from .float16 import in_float32

MARKED = 1 << 20  # elements of a checksum at a time: 8 MB an int64 tensor, whatever the network's size
PLACE = 0x9E3779B97F4A7C1 << 1  # even, so that place * PLACE + 1 is odd: a change of one element always shows
SET = 50_000_000  # parameters: two gradients of so many are held for a comparison, 0.4 GB in float32


def compare_gradients(
    parameters: dict[str, nn.Parameter],
    loss: Callable[[], Tensor],
    exact: bool,
    float16: Sequence[nn.Module] = (),
) -> str:
    """Compare the gradients of the active backend with the reference backend's, on this model and this batch.

    Exact arithmetic (float32) allows 2 % a tensor. In 16 bits the gradient of one small tensor is mostly rounding, in
    the reference's too, so there each difference is held against a part of the whole gradient. float16 loses gradients
    in the reference too, so there the reference computes in float32, and ours are scaled as in the training.

    Args:
        parameters: what trains, by name.
        loss: computes the loss of one batch, the same at every call.
        exact: the network computes in float32.
        float16: the networks that gradients pass through in float16.

    Returns:
        the largest difference, as a sentence; NotTrained names the tensor where one is too large.
    """
    parameters = _some(parameters)
    ours = _scaled_gradients(parameters, loss) if float16 else _gradients(parameters, loss)
    with pcs_kernels.backend("reference"), in_float32(float16):
        theirs = _gradients(parameters, loss)
    whole = float(torch.stack([g.float().norm() for g in theirs.values()]).norm())
    if not whole > 0:
        raise NotTrained("no tensor has a gradient, or it is not finite: nothing would train")
    # (largest relative difference, least part of the whole gradient that it is held against). float32 kernels differ by
    # 1e-4 or less in the op tests; two bfloat16 backwards of the same step differ by up to a third on small tensors.
    # float16 has three more bits: an eighth. On the embedded model, with a loss as small as SD1.5's mean, methods are
    # within 0.003 with the loss scaled and 0.08 to 0.77 away without.
    limit, least = (0.05, 0.3) if float16 else (0.02, 1e-3) if exact else (0.4, 0.3)
    errors = {}
    for name in parameters:
        difference = float((ours[name].float() - theirs[name].float()).norm())
        errors[name] = difference / max(float(theirs[name].float().norm()), least * whole)
        if not errors[name] <= limit:
            raise NotTrained(
                f"the gradient of {name} is {errors[name]:.0%} away from the reference's here; PCS_BACKEND=reference "
                "trains correctly, and `pcs doctor` says which operation is at fault"
            )
    worst = max(errors, key=errors.__getitem__)
    return f"gradients agree with the reference (largest difference {errors[worst]:.1e}, {worst})"


def _some(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """All of a small set; of a whole network about fifty tensors from its first layer to its last."""
    if sum(p.numel() for p in parameters.values()) <= SET:
        return parameters
    names = [name for name, p in parameters.items() if p.numel() <= SET // 50]
    return {name: parameters[name] for name in names[:: max(1, len(names) // 50)]}


def _gradients(parameters: dict[str, nn.Parameter], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def _scaled_gradients(parameters: dict[str, nn.Parameter], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradients of the loss under a scale that none of them overflows with, without the scale, in float32."""
    scale = LossScale()
    while True:
        found = _gradients(parameters, lambda: loss() * scale.value)
        if all(bool(g.isfinite().all()) for g in found.values()):
            return {name: g.float() / scale.value for name, g in found.items()}
        if not scale.overflowed():
            raise NotTrained("the loss or a gradient is not finite in float16. Fix: load the model in float32")


class Movement:
    """Which tensors have moved since the start, told by checksums: a copy of a whole model would cost too much."""

    def __init__(self, trained: Mapping[str, Tensor], frozen: Iterable[tuple[str, Tensor]]) -> None:
        self.trained = {name: (p, _mark(p)) for name, p in trained.items()}
        self.frozen = {name: (p, _mark(p)) for name, p in frozen}

    def unmoved(self) -> list[str]:
        return [name for name, (p, mark) in self.trained.items() if _mark(p) == mark]

    def moved_frozen(self) -> list[str]:
        return [name for name, (p, mark) in self.frozen.items() if _mark(p) != mark]

    def check(self, seldom: tuple[str, ...]) -> str:
        still = [name for name in self.unmoved() if name not in seldom]
        if still:
            raise NotTrained(
                f"{still[0]} has not moved ({len(still)} of {len(self.trained)} tensors): it does not train"
            )
        moved = self.moved_frozen()
        if moved:
            raise NotTrained(f"{moved[0]} is frozen and has moved: something else writes to the model")
        return f"all {len(self.trained)} trainable tensors have moved, none of {len(self.frozen)} frozen ones"


@torch.no_grad()
def _mark(p: Tensor) -> int:
    """A checksum of a tensor's bits, each element's weighted by its place.

    A sum of the values would not do: at small learning rates bfloat16 weights flip up as often as down, and their sum
    stays while they train.
    """
    bits = full_value(p.detach()).flatten()
    bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    total = 0
    for start in range(0, len(bits), MARKED):
        part = bits[start : start + MARKED].long()
        places = torch.arange(start, start + len(part), device=part.device)
        total += int((part * (places * PLACE + 1)).sum())  # int64 wraps around, the same way every time
    return total


def check_file(in_memory: Tensor, from_file: Tensor, base: Tensor, path: Any) -> str:
    """The saved file predicts what the trained model predicts, and not what the base model does; else NotTrained.

    Args:
        in_memory: the trained model's prediction for fixed noise.
        from_file: the prediction with the file, reloaded, on the base model.
        base: the base model's own.
        path: what to call the file in a sentence.
    """
    if torch.equal(from_file, base):
        raise NotTrained(f"{path} changes nothing: its prediction is the base model's")
    # A change below a thousandth of the prediction is rounding in 16 bits, so the error is not held against less.
    scale = float((in_memory - base).float().norm()) + 1e-3 * float(base.float().norm())
    error = float((in_memory - from_file).float().norm()) / scale
    if not error < 0.02:  # the file holds what memory held: only dtype conversions lie between them
        raise NotTrained(
            f"{path} does not hold what was learned: its prediction differs by {error:.0%} from the trained model's"
        )
    change = float((from_file - base).float().norm() / base.float().norm())
    return f"the file, reloaded, matches the trained model (differs from the base model by {change:.1%})"
