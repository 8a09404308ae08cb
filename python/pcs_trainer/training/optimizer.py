"""One optimizer step: rates, the loss scale, clipping, sharing between processes, the guard against NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pcs_kernels.optim import AdamW8bit, LossScale, StepInBackward, step_in_backward
from pcs_kernels.optim.saved import own_part

from ..concept import grammar
from ..distributed import (
    any_process,
    gathered_states,
    in_all_processes,
    is_part,
    norm_of,
    rank_and_world,
    share_gradients,
)
from ..methods.learner import Learner
from ..settings import Settings
from .float16 import float16_networks

GOOD_EVERY = 10  # steps between copies of a good state: at most so many are lost, and a copy costs little
LOSS, GRADIENT = "the loss is not finite", "a gradient is not finite"
LARGEST_COPY = 50_000_000  # parameters, 0.2 GB in float32: above it, checkpoints on disk are the only way back


VERDICT = 4  # numbers that tell of a step: whether the loss, and the step, was good; the loss scale before and after


class Masters:
    """float32 copies of 16-bit parameters for an optimizer that cannot round stochastically: torch's AdamW.

    A parameter in float32 is its own master.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.of = {p: p if p.dtype == torch.float32 else p.detach().float() for p in parameters}
        self._copies = [(p, master) for p, master in self.of.items() if p is not master]

    @torch.no_grad()
    def take_gradients(self, scale: Tensor) -> None:
        """Give each master its parameter's gradient times `scale`; the parameter's own is freed."""
        for p, master in self.of.items():
            if p.grad is None:
                master.grad = None
            elif p is master:
                p.grad.mul_(scale)
            else:  # multiplied in float32: a gradient without its loss scale may be too small for float16
                master.grad, p.grad = p.grad.float().mul_(scale), None

    @torch.no_grad()
    def give_values(self) -> None:
        """Round the masters into their parameters, and free their gradients."""
        for p, master in self._copies:
            p.copy_(master)
            master.grad = None

    def state_dict(self) -> list[Tensor]:
        """The copies, in the order of their parameters."""
        return [master for _, master in self._copies]

    @torch.no_grad()
    def load_state_dict(self, saved: list[Tensor] | None) -> None:
        """The saved copies; where there are none (an older checkpoint, a run in float32), the parameters' values."""
        for i, (p, master) in enumerate(self._copies):
            master.copy_(saved[i] if saved else p)


class Stepper:
    """The optimizer of a run and all that surrounds its step."""

    def __init__(self, learner: Learner, s: Settings) -> None:
        self.s = s
        weights, rows = learner.groups()
        self.parameters = weights | rows
        self.world = rank_and_world()[1]
        self.device = next(iter(self.parameters.values())).device
        self.scale = LossScale(device=self.device) if float16_networks(learner) else None
        self.masters = Masters(list(self.parameters.values())) if s.optimizer == "adamw" else None
        groups: list[dict[str, Any]] = []
        apart = s.encoder_rate() != s.learning_rate  # else one group, as checkpoints of equal rates have it
        for rate, on in ((s.learning_rate, True), (s.encoder_rate(), False)):
            mine = [p for name, p in weights.items() if (grammar.on_unet(name) or not apart) is on]
            if mine:
                groups.append({"params": mine, "lr": rate, "weight_decay": s.weight_decay})
        if rows:
            rate = s.token_learning_rate or s.learning_rate
            groups.append({"params": list(rows.values()), "lr": rate, "weight_decay": 0.0})
        self.rates = [group["lr"] for group in groups]
        if self.masters is not None:
            for group in groups:
                group["params"] = [self.masters.of[p] for p in group["params"]]
        self.handle: StepInBackward | None = None
        self.optimizer: AdamW8bit | torch.optim.AdamW
        if s.optimizer == "adamw8bit":
            self.optimizer = AdamW8bit(groups, betas=(0.9, 0.999), seed=s.seed, states=s.states)
            if s.step_in_backward and self.world == 1:
                self.handle = step_in_backward(self.optimizer, s.accumulate, s.clip_norm or None, s.clip)
        else:
            # torch's loops over lists take no mixture of whole tensors and parts of tensors. Its fused step alone can
            # leave everything as it is on the device's own word; on the CPU asking costs nothing.
            parts = any(is_part(p) for p in self.parameters.values())
            fused = True if self.device.type != "cpu" and not parts else None
            loops = False if parts else None
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), foreach=loops, fused=fused)
        self.reason = ""
        self.overflowed = False  # in the last step: the loss scale was too large, which is no fault of the run
        self.is_settled = False  # a step was good: the next ones do the same work
        self._good: tuple[int, list[Tensor]] | None = None

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def values(self) -> Mapping[str, Tensor]:
        """What trains, by name, as the optimizer holds it: float32 copies move long before their rounded values."""
        return self.parameters if self.masters is None else {n: self.masters.of[p] for n, p in self.parameters.items()}

    def rates_now(self) -> dict[str, float]:
        """The learning rate of the last step, by the parameter's name."""
        rates = {id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]}
        return {name: rates[id(value)] for name, value in self.values.items()}

    def has_seen(self, value: Tensor) -> bool:
        """Whether the optimizer has met a gradient that is not zero, in any process's part; of one of `values`."""
        seen = has_average(self.optimizer, value)
        return any_process(seen) if is_part(value) else seen

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
        """One whole step, waited for: `prepare`, `run` and `follow`."""
        self.prepare(step)
        return self.follow(self.run(loss_of).tolist(), None)

    def prepare(self, step: int) -> tuple[int, list[Tensor]] | None:
        """What the host does before a step.

        Args:
            step: how many steps came before.

        Returns:
            From time to time a copy of what trains, with `step`: for `follow`, once the step is known to be good.
        """
        factor = self.factor(step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        if isinstance(self.optimizer, AdamW8bit):
            self.optimizer.prepare()
        if self.handle is not None and not self.is_settled:
            self.handle.norm = None  # of a step that may have been bad: the host hears of it one step late
        return self._copy(step) if step and step % GOOD_EVERY == 0 else None

    def run(self, loss_of: Callable[[int], Tensor]) -> Tensor:
        """Run the micro-batches and update: work of the device alone, which decides whether the numbers are good.

        Where one is not finite nothing is updated or, with the step in the backward and clip="previous", everything
        but the tensors whose gradient it was.

        Args:
            loss_of: the loss of a micro-batch by its number, its share of the mean over all of them.

        Returns:
            What `follow` reads [VERDICT], on the device.
        """
        before = self._loss_scale.clone()
        finite, good = self._in_backward(loss_of) if self.handle is not None else self._after_backward(loss_of)
        if self.scale is not None:
            self.scale.follow(good, finite & ~good)
        return torch.stack([finite.float(), good.float(), before, self._loss_scale])

    def follow(self, numbers: Sequence[float], before: tuple[int, list[Tensor]] | None) -> bool:
        """Take note of a step that has ended.

        Args:
            numbers: what `run` returned.
            before: what `prepare` returned.

        Returns:
            Whether the step was good; `reason` says what was not.
        """
        finite, good, was, scale = numbers
        self.overflowed = scale < was
        if good:
            self.reason, self.is_settled = "", True
            self._good = before or self._good  # the loss of this state is known to be finite
            return True
        if self.handle is not None and not self.is_settled:
            self.handle.norm = None  # none is known yet: the next step measures its own
        overflow = f"a float16 gradient overflowed; the loss scale goes from {was:g} to {scale:g}"
        self.reason = overflow if self.overflowed else GRADIENT if finite else LOSS
        return False

    def _in_backward(self, loss_of: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """The optimizer runs inside the backward; a loss that is not finite lets it change nothing."""
        handle = self.handle
        assert handle is not None
        losses: list[Tensor] = []

        def watched(micro: int) -> Tensor:
            loss = loss_of(micro)
            losses.append(loss.detach())
            handle.loss_finite = torch.stack(losses).isfinite().all()
            return loss

        handle.loss_scale = self._loss_scale
        handle.backward(*(partial(watched, micro) for micro in range(self.s.accumulate)))
        finite = torch.stack(losses).isfinite().all()
        return finite, finite & (handle.refused == 0)

    def _after_backward(self, loss_of: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        trained, losses = list(self.parameters.values()), []
        for micro in range(self.s.accumulate):
            loss = loss_of(micro)
            losses.append(loss.detach())
            (loss * self._loss_scale).backward()
        if self.world > 1:
            share_gradients([p for p in trained if not is_part(p)])
        norm = norm_of([p.grad for p in trained if p.grad is not None]) / self._loss_scale
        # The same in every process: all of them adapt the loss scale by it.
        finite = in_all_processes(torch.stack(losses).isfinite().all())
        good = finite & in_all_processes(norm.isfinite())
        clipped = (self.s.clip_norm / (norm + 1e-6)).clamp_max(1.0) if self.s.clip_norm else torch.ones_like(norm)
        self._update(clipped / self._loss_scale, good)
        for p in trained:
            p.grad = None
        return finite, good

    @property
    def _loss_scale(self) -> Tensor:
        """What the losses, and so the gradients, are multiplied by."""
        return torch.ones((), device=self.device) if self.scale is None else self.scale.value

    def _update(self, factor: Tensor, good: Tensor) -> None:
        """The optimizer's step with the gradients times a factor; nothing where `good` is False."""
        if isinstance(self.optimizer, AdamW8bit):
            self.optimizer.step(grad_scale=factor, finite=good)
            return
        assert self.masters is not None
        fused = self.optimizer.defaults["fused"]
        if not fused and not bool(good):
            return
        self.masters.take_gradients(factor)
        if fused:
            setattr(self.optimizer, "found_inf", (~good).float())  # noqa: B010 - as torch's GradScaler tells it
        self.optimizer.step()
        self.masters.give_values()

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

    def recorded(self) -> None:
        """Give the optimizer's recorded kernels what they read."""
        if isinstance(self.optimizer, AdamW8bit):
            self.optimizer.prepare()

    def forget(self) -> None:
        """Drop what a step that broke off has gathered."""
        if self.handle is not None:
            self.handle.forget()
        for p in self.parameters.values():
            p.grad = None

    def close(self) -> None:
        """Let go of the optimizer, its state and the parameters, and take its hooks off; no step follows."""
        if self.handle is not None:
            self.handle.remove()
        self.parameters, self.handle, self.masters, self._good = {}, None, None, None
        self.__dict__.pop("optimizer", None)

    @property
    def sharded(self) -> bool:
        return any(is_part(p) for p in self.parameters.values())

    def state_dict(self) -> Any:
        """The optimizer's state; of a sharded one every process's, in the first process."""
        own: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        for name, part in (("handle", self.handle), ("scale", self.scale), ("masters", self.masters)):
            if part is not None:
                own[name] = part.state_dict()
        return gathered_states(own) if self.sharded else own

    def load_state_dict(self, state: Any) -> None:
        """Go on from a saved state; one from before the loss scale and float32 copies begins these anew."""
        if self.sharded:
            state = state[rank_and_world()[0]]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.handle is not None:
            self.handle.load_state_dict(state["handle"])
            self.is_settled = self.handle.norm is not None
        if self.scale is not None and "scale" in state:
            self.scale.load_state_dict(state["scale"])
        if self.masters is not None:
            self.masters.load_state_dict(state.get("masters"))


def has_average(optimizer: torch.optim.Optimizer, p: Tensor) -> bool:
    """Whether the running average of a parameter's gradients is not zero everywhere."""
    if isinstance(optimizer, AdamW8bit):
        optimizer.finish()
    state = optimizer.state.get(p) or {}
    # Of a coded average the scales tell: they are zero where it is, and its codes are not.
    found = next((state[name] for name in ("absmax1", "state1", "exp_avg") if name in state), None)
    return found is not None and bool(own_part(found).any())
