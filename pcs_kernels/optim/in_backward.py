"""The optimizer step inside the backward: each parameter is updated, and its gradient freed, as it is produced.

Only one layer's gradient is alive at a time. Accumulation and clipping on the global norm keep their meaning:

clip="two_pass"  the backward runs twice, first for the norm alone, then for the steps: exact, one more pass.
clip="previous"  the coefficient comes from the norm of the step before (the first step is done in two passes): one
                 pass; equal to exact clipping where the norm changes slowly.

What is decided from a gradient is decided on its device: the norm, the coefficient of clipping, and the refusal of what
is not finite, by a coefficient of NaN or by a parameter's own flag. Which passes run depends on counts that the host
keeps. So no step waits for the device, and a CUDA graph may hold one.
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
APART = 16  # bytes between two parameters' flags: kernels are compiled once for addresses that 16 divides


class StepInBackward:
    """The hooks on an optimizer's parameters; made by `step_in_backward`.

    `norm` is that of the gradients without the loss scale in the last finished step whose gradients were finite, and
    None before any; NaN where none was finite. `refused` counts the parameters that the last finished step left as
    they were. Both stay on the device, each step's in a tensor of its own (in a CUDA graph in the graph's): to read one
    waits for the device.
    """

    def __init__(self, opt: AdamW8bit, accumulate: int, max_norm: float | None, clip: str) -> None:
        self.opt = opt
        self.accumulate = accumulate
        self.max_norm = max_norm
        self.clip = clip
        self._groups = {p: group for group in opt.param_groups for p in group["params"] if p.requires_grad}
        device = next(iter(self._groups)).device if self._groups else torch.device("cpu")
        self.norm: Tensor | None = None
        self.refused = torch.zeros((), dtype=torch.int32, device=device)
        # `backward` multiplies the losses by it, and every step divides the gradients by it; or a one-element tensor
        self.loss_scale: float | Tensor = 1.0
        self.loss_finite: Tensor | None = None  # a bool for the running step: False refuses all of it
        self._measuring = False  # the first of two passes: norms only
        self._whole = False  # `backward` runs, and ends the step
        self._steps_now = max_norm is None  # whether hooks may update already
        self._known = torch.full((), math.nan, device=device)  # the norm that "previous" clips by
        self._norm_now: Tensor | None = None  # of the running step, where it is measured before its updates
        self._scale: float | Tensor | None = None  # what the running step's gradients are multiplied by
        self._passes: dict[Tensor, int] = {}
        self._squares: list[Tensor] = []
        self._flags: dict[torch.device, Tensor] = {}  # [P, APART] bool: whose gradient was finite
        self._flag: dict[Tensor, Tensor] = {}
        for where in dict.fromkeys(p.device for p in self._groups):
            mine = [p for p in self._groups if p.device == where]
            self._flags[where] = torch.ones(len(mine), APART, dtype=torch.bool, device=where)
            self._flag |= {p: flags[0] for p, flags in zip(mine, self._flags[where].unbind(), strict=True)}
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
        if len(losses) != self.accumulate:
            raise ValueError(f"step_in_backward was made for {self.accumulate} micro-batches, not {len(losses)}")
        unknown = self.clip == "two_pass" or self.norm is None
        if self.max_norm is not None and self.norm is None:
            self._steps_now = False  # the norm may have been taken away since the last step ended
        if self.max_norm is not None and unknown and self.accumulate == 1:
            self._measure(losses[0])
            self._norm_now = self._take_norm()
            self._steps_now = True
        found: list[Tensor] = []
        self._whole = True
        try:
            for micro_batch in losses:
                loss = micro_batch()
                (loss * self._loss_scale).backward()
                found.append(loss.detach())
            self.finish()
        finally:
            self._whole = False
        return functools.reduce(torch.add, found)

    def _measure(self, loss_of: Callable[[], Tensor]) -> None:
        """A backward for the norm alone."""
        self._measuring = True
        try:
            (loss_of() * self._loss_scale).backward()
        finally:
            self._measuring = False

    @property
    def _loss_scale(self) -> float | Tensor:
        return self.loss_scale.reshape(()) if isinstance(self.loss_scale, Tensor) else self.loss_scale

    def finish(self) -> None:
        """End a step that plain `loss.backward()` calls made: step what waited for the norm, forget the counts."""
        waiting = [p for p in self._groups if p.grad is not None and self._passes.get(p)]
        norm = self._norm_now
        if self._squares:
            norm = self._take_norm()
        elif self.max_norm is not None and waiting:
            norm = self._norm_of([sum_of_squares(p.grad) for p in waiting])
        if waiting and not self._steps_now:
            self._norm_now = norm  # nothing has been stepped yet: all of it is, by this norm
        for p in waiting:
            self._update(p, sum_of_squares(p.grad))
        if norm is not None:  # one bad step says nothing about the next
            self._known.copy_(torch.where(norm < math.inf, norm, self._known))
            self.norm = self._known.clone()
        self._count_refused()
        self._begin_anew()

    def _count_refused(self) -> None:
        device = self.refused.device
        bad = [(~flags[:, 0]).sum(dtype=torch.int32).to(device) for flags in self._flags.values()]
        if not bad:
            return
        refused = functools.reduce(torch.add, bad)
        if isinstance(self._scale, Tensor):
            refused = torch.where(self._scale.abs() < math.inf, refused, len(self._groups))
        self.refused = refused

    def _begin_anew(self) -> None:
        """Nothing of a step is under way."""
        self._passes.clear()
        self._squares.clear()
        for flags in self._flags.values():
            flags.fill_(True)
        self._norm_now = self._scale = self.loss_finite = None
        self._steps_now = self.max_norm is None or (self.clip == "previous" and self.norm is not None)

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
        for p in self._groups:
            p.grad = None
        self._begin_anew()

    def state_dict(self) -> dict[str, float | None]:
        """What the next step's clipping depends on; read from the device here."""
        known = float(self._known)
        return {"norm": known if math.isfinite(known) else None}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        norm = state["norm"]
        self._known.fill_(math.nan if norm is None else norm)
        self.norm = None if norm is None else self._known.clone()
        self._begin_anew()

    def _update(self, p: Tensor, square: Tensor) -> None:
        """Step p, unless its own gradient or the whole step is not finite, and let its gradient go."""
        if self._scale is None:
            self._scale = self._scale_now()
        flag = self._flag[p]
        torch.lt(square, math.inf, out=flag)
        self.opt.update(p, self._groups[p], self._scale, flag)
        if self.max_norm is None and not self._whole:
            self._scale = None  # nobody says where the step ends
        self._passes[p] = 0
        p.grad = None

    def _scale_now(self) -> float | Tensor:
        """What the gradients are multiplied by: without the loss scale, clipped; NaN where all is to be refused."""
        scale = 1.0 / self._loss_scale
        if self.max_norm is not None:
            norm = self._known if self._norm_now is None else self._norm_now
            clipped = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)  # torch.nn.utils.clip_grad_norm_'s own 1e-6
            # A measured norm that is not finite refuses the step; that none was known before only leaves it unclipped.
            otherwise = 1.0 if self._norm_now is None else math.nan
            scale = scale * torch.where(norm < math.inf, clipped, otherwise)
        if self.loss_finite is not None:
            scale = torch.where(self.loss_finite.reshape(()), scale, math.nan)
        return scale

    def _take_norm(self) -> Tensor:
        norm = self._norm_of(self._squares)
        self._squares.clear()
        return norm

    def _norm_of(self, squares: list[Tensor]) -> Tensor:
        """The norm of all gradients without their loss scale, from the sums of their squares."""
        on_one = [square.to(self._known.device, non_blocking=True) for square in squares]
        return torch.stack(on_one).sum().sqrt() / self._loss_scale


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
