"""The optimizer step inside the backward: each parameter is updated, and its gradient freed, as it is produced.

Only one layer's gradient is alive at a time. Accumulation and clipping on the global norm keep their meaning:

clip="two_pass"  the backward runs twice, first for the norm alone, then for the steps: exact, one more pass.
clip="previous"  the coefficient comes from the norm of the step before (the first step is done in two passes): one
                 pass; equal to exact clipping where the norm changes slowly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._layout import in_memory_order
from .adamw8bit import AdamW8bit

PART = 1 << 16  # elements whose squares are summed at a time: 256 KiB in float32 stay in a core's L2 cache


class StepInBackward:
    """The hooks on an optimizer's parameters; made by `step_in_backward`."""

    def __init__(self, opt: AdamW8bit, accumulate: int, max_norm: float | None, clip: str) -> None:
        self.opt = opt
        self.accumulate = accumulate
        self.max_norm = max_norm
        self.clip = clip
        self.norm: float | None = None  # of the last finished step, without the scale
        self.loss_scale = 1.0  # `backward` multiplies the losses by it, and every step divides the gradients by it
        self.refused = 0  # parameters whose gradient was not finite in the last step: they were left as they are
        self._measuring = False  # the first of two passes: norms only
        self._steps_now = max_norm is None  # whether hooks may update already
        self._coefficient = 1.0
        self._passes: dict[Tensor, int] = {}
        self._squares: list[Tensor] = []
        self._groups = {p: group for group in opt.param_groups for p in group["params"] if p.requires_grad}
        self._hooks = [p.register_post_accumulate_grad_hook(self._produced) for p in self._groups]

    def backward(self, loss_of: Callable[[], Tensor], *more: Callable[[], Tensor]) -> Tensor:
        """Run one whole optimizer step.

        Args:
            loss_of: computes the loss of one micro-batch. With two passes the callable of a single micro-batch is
                called twice and must compute the same loss both times.
            *more: the same for the further micro-batches.

        Returns:
            The sum of the losses, detached.
        """
        losses = (loss_of, *more)
        self.refused = 0
        if len(losses) != self.accumulate:
            raise ValueError(f"step_in_backward was made for {self.accumulate} micro-batches, not {len(losses)}")
        unknown = self.clip == "two_pass" or self.norm is None
        if self.max_norm is not None and unknown and self.accumulate == 1:
            measured = self._measure(losses[0])
            norm = self._take_norm()
            if not math.isfinite(norm):  # known before anything was stepped: everything stays as it is
                self.refused = len(self._groups)
                return measured
            self.norm = norm
            self._set_coefficient(norm)
            self._steps_now = True
        found: list[Tensor] = []
        for micro_batch in losses:
            loss = micro_batch()
            (loss * self.loss_scale).backward()
            found.append(loss.detach())
        self.finish()
        return functools.reduce(torch.add, found)

    def _measure(self, loss_of: Callable[[], Tensor]) -> Tensor:
        """A backward for the norm alone."""
        self._measuring = True
        try:
            loss = loss_of()
            (loss * self.loss_scale).backward()
        finally:
            self._measuring = False
        return loss.detach()

    def finish(self) -> None:
        """End a step that plain `loss.backward()` calls made: step what waited for the norm, forget the counts."""
        if not any(self._passes.values()) and not self._squares:
            return
        waiting = [p for p in self._groups if p.grad is not None]
        if self._squares:
            norm = self._take_norm()
            self.norm = norm if math.isfinite(norm) else self.norm  # one bad step says nothing about the next
        elif self.max_norm is not None and waiting:
            norms = torch.stack([sum_of_squares(p.grad) for p in waiting]).sqrt()
            self.norm = float(torch.linalg.vector_norm(norms)) / self.loss_scale
        if waiting and not self._steps_now and self.max_norm is not None:
            if self.norm is None or not math.isfinite(self.norm):  # nothing has been stepped yet: nothing is
                self.refused, self.norm = len(waiting), None
                self.forget()
                return
            self._set_coefficient(self.norm)
        for p in waiting:
            self._update(p, sum_of_squares(p.grad))
        self._passes.clear()
        if self.max_norm is not None:
            self._steps_now = self.clip == "previous" and self.norm is not None
            self._set_coefficient(self.norm)

    def remove(self) -> None:
        """Take the hooks off; the optimizer works as before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _produced(self, p: Tensor) -> None:
        if self._measuring:
            self._squares.append(sum_of_squares(p.grad))
            p.grad = None
            return
        self._passes[p] = self._passes.get(p, 0) + 1
        if self._passes[p] < self.accumulate:
            return
        square = sum_of_squares(p.grad)
        if self.max_norm is not None and self.clip == "previous":
            self._squares.append(square)
        if self._steps_now:
            self._update(p, square)

    def forget(self) -> None:
        """Drop what an unfinished step has gathered: nothing more of it is applied."""
        self._passes.clear()
        self._squares.clear()
        for p in self._groups:
            p.grad = None
        self._steps_now = self.max_norm is None or (self.clip == "previous" and self.norm is not None)

    def state_dict(self) -> dict[str, float | None]:
        """What the next step's clipping depends on."""
        return {"norm": self.norm}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self.norm = state["norm"]
        if self.max_norm is not None:
            self._steps_now = self.clip == "previous" and self.norm is not None
            self._set_coefficient(self.norm)

    def _update(self, p: Tensor, square: Tensor) -> None:
        if bool(torch.isfinite(square)):
            self.opt.update(p, self._groups[p], self._coefficient / self.loss_scale)
        else:
            self.refused += 1
        self._passes[p] = 0
        p.grad = None

    def _take_norm(self) -> float:
        norm = float(torch.stack([s.cpu() for s in self._squares]).sum().sqrt()) / self.loss_scale
        self._squares.clear()
        return norm

    def _set_coefficient(self, norm: float | None) -> None:
        if self.max_norm is not None and norm is not None:
            self._coefficient = min(1.0, self.max_norm / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_'s own 1e-6


def sum_of_squares(gradient: Tensor | None) -> Tensor:
    """The sum of a gradient's squares in float32; 16-bit CPU tensors in parts, whose float32 copies stay in the cache.

    Args:
        gradient: of any shape and memory format; None is refused.
    """
    assert gradient is not None
    flat = in_memory_order(gradient, gradient.detach()).flatten()
    if flat.dtype == torch.float32 or flat.device.type != "cpu":
        return torch.linalg.vector_norm(flat, dtype=torch.float32).square()
    parts = (part.float() for part in flat.split(PART))
    return torch.stack([torch.dot(part, part) for part in parts]).sum()


def step_in_backward(
    opt: AdamW8bit, accumulate: int = 1, max_norm: float | None = None, clip: str = "two_pass"
) -> StepInBackward:
    """Update each parameter inside the backward that produces its gradient, and free that gradient.

    Without clipping, or with clip="previous", plain `loss.backward()` works (call `handle.finish()` after each step
    where max_norm is given); `handle.backward(lambda: loss)` does a whole step in every case.

    Args:
        opt: the optimizer whose parameters are updated.
        accumulate: micro-batches of one step.
        max_norm: clip the global norm of the gradients to this; default: no clipping.
        clip: "two_pass" (exact, one more backward) or "previous" (by the norm of the step before).

    Returns:
        The handle of the hooks; `handle.remove()` takes them off.
    """
    if not isinstance(opt, AdamW8bit):
        raise TypeError(f"opt must be pcs_kernels.optim.AdamW8bit, not {type(opt).__name__}")
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate must be an integer of at least 1, not {accumulate!r}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be above 0 or None, not {max_norm}")
    if clip not in ("two_pass", "previous"):
        raise ValueError(f'clip must be "two_pass" or "previous", not {clip!r}')
    return StepInBackward(opt, accumulate, max_norm, clip)
