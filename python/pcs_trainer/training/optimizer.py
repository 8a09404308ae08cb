"""One optimizer step: rates, clipping on the global norm, sharing between processes, the guard against NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pcs_kernels.optim import AdamW8bit, StepInBackward, step_in_backward

from ..distributed import any_process, gathered_states, is_part, norm_of, rank_and_world, share_gradients
from ..methods.learner import Learner
from ..settings import Settings

GOOD_EVERY = 10  # steps between copies of a good state: at most so many are lost, and a copy costs little
LARGEST_COPY = 50_000_000  # parameters, 0.2 GB in float32: above it, checkpoints on disk are the only way back


class _NotFinite(Exception):
    """A loss is NaN or infinite, seen before its backward."""


class Stepper:
    """The optimizer of a run and all that surrounds its step."""

    def __init__(self, learner: Learner, s: Settings) -> None:
        self.s = s
        weights, rows = learner.groups()
        self.parameters = weights | rows
        self.world = rank_and_world()[1]
        groups: list[dict[str, Any]] = []
        if weights:
            groups.append({"params": list(weights.values()), "lr": s.learning_rate, "weight_decay": s.weight_decay})
        if rows:
            rate = s.token_learning_rate or s.learning_rate
            groups.append({"params": list(rows.values()), "lr": rate, "weight_decay": 0.0})
        self.rates = [group["lr"] for group in groups]
        self.handle: StepInBackward | None = None
        self.optimizer: AdamW8bit | torch.optim.AdamW
        if s.optimizer == "adamw8bit":
            self.optimizer = AdamW8bit(groups, betas=(0.9, 0.999), seed=s.seed)
            if s.step_in_backward and self.world == 1:
                self.handle = step_in_backward(self.optimizer, s.accumulate, s.clip_norm or None, s.clip)
        else:
            # torch's loops over lists take no mixture of whole tensors and parts of tensors.
            loops = False if any(is_part(p) for p in self.parameters.values()) else None
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), foreach=loops)
        self.reason = ""
        self._good: tuple[int, list[Tensor]] | None = None

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def factor(self, step: int) -> float:
        """Warm-up, then the schedule: what the rates are multiplied by."""
        s = self.s
        if step < s.warmup:
            return (step + 1) / s.warmup
        share = (step - s.warmup) / max(1, s.steps - s.warmup)
        if s.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        return 1 - share if s.lr_schedule == "linear" else 1.0

    def step(self, loss_of: Callable[[int], Tensor], step: int) -> bool:
        """Run the micro-batches and update.

        Args:
            loss_of: the loss of a micro-batch by its number, its share of the mean over all of them.
            step: how many steps came before.

        Returns:
            False where a number was not finite: nothing was updated then or, with the step in the backward and
            clip="previous", everything but the tensors whose gradient it was.
        """
        factor = self.factor(step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        before = self._copy(step) if step and step % GOOD_EVERY == 0 else None
        good = self._in_backward(loss_of) if self.handle is not None else self._after_backward(loss_of)
        if good and before is not None:  # the loss of this state is known to be finite
            self._good = before
        return good

    def close(self) -> None:
        """Take the optimizer off the parameters: the model's own are trained again by later runs."""
        if self.handle is not None:
            self.handle.remove()

    def _in_backward(self, loss_of: Callable[[int], Tensor]) -> bool:
        """The optimizer runs inside the backward; a loss that is not finite ends the step before any backward."""
        assert self.handle is not None

        def guarded(micro: int) -> Tensor:
            loss = loss_of(micro)
            if not bool(torch.isfinite(loss)):
                raise _NotFinite
            return loss

        try:
            self.handle.backward(*(partial(guarded, micro) for micro in range(self.s.accumulate)))
        except _NotFinite:
            self.handle.forget()
            self.reason = "the loss is not finite"
            return False
        if self.handle.refused:
            self.reason = "a gradient is not finite"
            return False
        return True

    def _after_backward(self, loss_of: Callable[[int], Tensor]) -> bool:
        trained = list(self.parameters.values())
        finite = True
        for micro in range(self.s.accumulate):
            loss = loss_of(micro)
            finite = finite and bool(torch.isfinite(loss))
            loss.backward()
        if self.world > 1:
            share_gradients([p for p in trained if not is_part(p)])
        gradients = [p.grad for p in trained if p.grad is not None]
        norm = norm_of(gradients)
        good = not any_process(not (finite and math.isfinite(norm)))
        if good:
            scale = min(1.0, self.s.clip_norm / (norm + 1e-6)) if self.s.clip_norm else 1.0
            if isinstance(self.optimizer, AdamW8bit):
                self.optimizer.step(grad_scale=scale)
            else:
                for g in gradients:
                    g.mul_(scale)
                self.optimizer.step()
        self.reason = "" if good else "a gradient is not finite" if finite else "the loss is not finite"
        for p in trained:
            p.grad = None
        return good

    def _copy(self, step: int) -> tuple[int, list[Tensor]] | None:
        trained = list(self.parameters.values())
        if sum(p.numel() for p in trained) > LARGEST_COPY:
            return None
        return step, [p.detach().clone() for p in trained]

    @torch.no_grad()
    def restore_good(self) -> int | None:
        """Back to the last copy; the step it was made after, or None where there is none."""
        trained = list(self.parameters.values())
        if self._good is None:
            return None
        for p, value in zip(trained, self._good[1], strict=True):
            p.copy_(value)
        return self._good[0]

    @property
    def sharded(self) -> bool:
        return any(is_part(p) for p in self.parameters.values())

    def state_dict(self) -> Any:
        """The optimizer's state; of a sharded one every process's, in the first process."""
        held = {} if self.handle is None else {"handle": self.handle.state_dict()}
        own = {"optimizer": self.optimizer.state_dict()} | held
        return gathered_states(own) if self.sharded else own

    def load_state_dict(self, state: Any) -> None:
        if self.sharded:
            state = state[rank_and_world()[0]]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.handle is not None:
            self.handle.load_state_dict(state["handle"])
