"""Proof that a run trains: gradients against the reference, what has moved and what not, the file against memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pcs_kernels
from pcs_kernels.optim import LossScale

from ..distributed import local_part, summed_over_parts
from ..errors import NotTrained
from .float16 import in_float32

MARKED = 1 << 20  # elements of a checksum at a time: 8 MB an int64 tensor, whatever the network's size
PLACE = 0x9E3779B97F4A7C1 << 1  # even, so that place * PLACE + 1 is odd
# Bit changes to be expected at the full learning rate before a tensor without any counts as stuck. Adam's steps are a
# tenth to all of the rate, so that 20 or more are due: a chance of exp(-20) to see none.
CERTAIN = 200
# Latents a side of the batch that is compared: every kernel runs at its real widths over several tiles, and the
# reference's attention, which holds all its scores, needs 0.14 GB an image where 64 a side (512 pixels) need 2.2.
PROOF_SIDE = 32
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
    parameters = some(parameters)
    ours = _scaled_gradients(parameters, loss) if float16 else gradients(parameters, loss)
    with pcs_kernels.backend("reference"), in_float32(float16):
        theirs = gradients(parameters, loss)
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


def some(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """All of a small set; of a whole network about fifty tensors from its first layer to its last."""
    if sum(p.numel() for p in parameters.values()) <= SET:
        return parameters
    names = [name for name, p in parameters.items() if p.numel() <= SET // 50]
    return {name: parameters[name] for name in names[:: max(1, len(names) // 50)]}


def gradients(parameters: dict[str, nn.Parameter], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradient of each parameter, zeros where it has none; `.grad` stays as it is."""
    found = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def _scaled_gradients(parameters: dict[str, nn.Parameter], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradients of the loss under a scale that none of them overflows with, without the scale, in float32."""
    scale = LossScale()
    while True:
        found = gradients(parameters, lambda: loss() * scale.value)
        if all(bool(g.isfinite().all()) for g in found.values()):
            return {name: g.float() / scale.value for name, g in found.items()}
        if not scale.overflowed():
            raise NotTrained(
                "the loss or a gradient is not finite in float16. Fix: load the model in bfloat16 or float32"
            )


class Movement:
    """Which tensors have moved since the start, told by checksums: a copy of a whole model would cost too much.

    Of a tensor that several processes share, each looks at its own part, and all of them hear of every change.

    A tensor trains where its optimizer has seen a gradient and its bits change. The second shows only where a change
    must be expected: weights of 16 bits are rounded stochastically, and a small one at a small rate may keep every bit
    for a hundred steps while it trains.
    """

    def __init__(self, trained: Mapping[str, Tensor], frozen: Iterable[tuple[str, Tensor]]) -> None:
        self.trained = {name: (p, _mark(p)) for name, p in trained.items()}
        self.frozen = {name: (p, _mark(p)) for name, p in frozen}
        flips = summed_over_parts([_steps_of_bits(p) for p in trained.values()], trained.values())
        self.flips = dict(zip(trained, flips, strict=True))
        self.way = dict.fromkeys(trained, 0.0)  # how far each element may have gone: the sum of its learning rates

    def stepped(self, rates: dict[str, float]) -> None:
        """An optimizer step was taken at these learning rates, by the tensor's name."""
        for name, rate in rates.items():
            self.way[name] += rate

    def unmoved(self) -> list[str]:
        """The trained tensors of which no bit has changed."""
        changed = _changed(self.trained)
        return [name for name in self.trained if name not in changed]

    def moved_frozen(self) -> list[str]:
        """The frozen tensors that something has written to."""
        changed = _changed(self.frozen)
        return [name for name in self.frozen if name in changed]

    def stuck(self, unmoved: Iterable[str]) -> list[str]:
        """Those of the unmoved tensors that should have changed many bits by now."""
        return [name for name in unmoved if self.way[name] * self.flips[name] >= CERTAIN]

    def check(self, seen: Callable[[Tensor], bool], unreached: Collection[str] = ()) -> str:
        """One sentence where everything trains; NotTrained names what does not.

        Args:
            seen: whether the optimizer has seen a gradient of a parameter that is not zero.
            unreached: tensors that no example of the steps so far has used, or that nothing depends on.
        """
        asked = {name: p for name, (p, _) in self.trained.items() if name not in unreached}
        blind = [name for name, p in asked.items() if not seen(p)]
        if blind:
            raise NotTrained(
                f"{blind[0]} gets no gradient ({len(blind)} of {len(self.trained)} tensors): it does not train"
            )
        unmoved = [name for name in self.unmoved() if name in asked]
        stuck = self.stuck(unmoved)
        if stuck:
            raise NotTrained(
                f"{stuck[0]} has not moved ({len(stuck)} of {len(self.trained)} tensors): it does not train"
            )
        moved = self.moved_frozen()
        if moved:
            raise NotTrained(f"{moved[0]} is frozen and has moved: something else writes to the model")
        count = len(asked) - len(unmoved)
        said = f"all {len(asked)}" if not unmoved else f"{count} of {len(asked)}"
        text = f"{said} trainable tensors have moved, none of {len(self.frozen)} frozen ones"
        if unmoved:
            text += f"; the other {len(unmoved)} get gradients, and their rate is below what 16 bits show so soon"
        return text


def _changed(marked: Mapping[str, tuple[Tensor, int]]) -> set[str]:
    """The tensors whose bits are no longer those that were marked, in any process."""
    here = [float(_mark(p) != mark) for p, mark in marked.values()]
    anywhere = summed_over_parts(here, [p for p, _ in marked.values()])
    return {name for name, changed in zip(marked, anywhere, strict=True) if changed}


@torch.no_grad()
def _steps_of_bits(p: Tensor) -> float:
    """How many elements change a bit where each goes a way of 1: the sum of 1 / (distance to the next number)."""
    values = local_part(p.detach())
    if values.dtype == torch.float32:
        return float("inf")  # any step of an optimizer shows in float32
    numbers = torch.finfo(values.dtype)
    total = 0.0
    for part in values.flatten().split(MARKED):
        exponent = torch.frexp(part.float().abs().clamp(min=numbers.tiny))[1]  # |x| < 2^exponent
        total += float(torch.ldexp(torch.full_like(exponent, 2.0 / numbers.eps, dtype=torch.float32), -exponent).sum())
    return total


@torch.no_grad()
def _mark(p: Tensor) -> int:
    """A checksum of a tensor's bits, each element's weighted by its place.

    A sum of the values would not do: at small learning rates bfloat16 weights flip up as often as down, and their sum
    stays while they train.
    """
    bits = local_part(p.detach()).flatten()
    bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    total = 0
    for start in range(0, len(bits), MARKED):
        part = bits[start : start + MARKED].long()
        odd = _odd_numbers(part.device)[: len(part)]
        # The odd numbers go on from part to part; int64 wraps around, the same way every time.
        total += int((part * odd).sum()) + start * PLACE * int(part.sum())
    return total % (1 << 64)


@functools.lru_cache(maxsize=4)  # 8 MB a device
def _odd_numbers(device: torch.device) -> Tensor:
    """place * PLACE + 1 for the places of one part: odd, so that a change of one element always shows."""
    return torch.arange(MARKED, device=device) * PLACE + 1


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
