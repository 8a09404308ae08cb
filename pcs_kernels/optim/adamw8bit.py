"""AdamW with 8-bit states: 2 bytes of optimizer state a parameter instead of 8.

The decoupled weight decay comes before the update, as in torch.optim.AdamW and bitsandbytes on the CPU; bitsandbytes
on CUDA applies it after (decay_first=False matches that, exactly). States have bitsandbytes' layout and names.

After the first step, in which states are made, no step waits for the host: steps are counted on the device, their
numbers are made there, and where a number is not finite the device refuses. A CUDA graph may hold the step; call
`prepare()` before each replay, so that it finds the rates of the day.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from .._dispatch import forced_backend
from .._layout import in_memory_order
from ..ops.adamw8bit.codes import blocks, code_map, device_map
from ..streaming import on_the_host
from .away import CODED, StatesAway
from .saved import BNB_NESTED, check_saved_state, loaded, own_part
from .step_numbers import StepNumbers, capturing
from .together import Launches, Together

Place = tuple[StepNumbers, int, dict[str, Any]]  # a parameter's row among its device's numbers, and its group


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose two states are coded in 8 bits by blocks.

    Args:
        params: parameters or parameter groups, contiguous or channels-last.
        lr: learning rate.
        betas: decay of the two running averages.
        eps: added to the root of the second average.
        weight_decay: decoupled, as in torch.optim.AdamW.
        block_size: elements that share one scale, a power of two from 16 to 4096; the default is bitsandbytes'.
        min_8bit_size: tensors with fewer elements keep float32 states; the default is bitsandbytes'.
        seed: bfloat16 and float16 parameters are rounded stochastically from it, so that updates below their
            precision are not lost; None rounds to nearest.
        decay_first: whether the weight decay comes before the update; False matches bitsandbytes on CUDA.
        states: "streamed" keeps the 8-bit states in the machine's memory, each on the device for its own update, with
            the same numbers; call `finish()` before you read them. No CUDA graph can hold such a step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        seed: int | None = 0,
        decay_first: bool = True,
        states: str = "device",
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number that is not negative, not {value}")
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), not {betas}")
        if not (16 <= block_size <= 4096) or block_size & (block_size - 1):
            raise ValueError(f"block_size must be a power of two from 16 to 4096, not {block_size}")
        if states not in ("device", "streamed"):
            raise ValueError(f'states must be "device" or "streamed", not {states!r}')
        self.block_size = block_size
        self.min_8bit_size = min_8bit_size
        self.seed = seed
        self.decay_first = decay_first
        self.states = states
        self._begin()
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay))

    def _begin(self) -> None:
        self._away = StatesAway(self.block_size) if self.states == "streamed" else None
        self._launches: Launches = {}
        self._numbers: dict[torch.device, StepNumbers] = {}
        self._in_graphs: list[StepNumbers] = []  # captured graphs read and write them whenever they are replayed
        self._place: dict[Tensor, Place] = {}  # of the parameters in the groups as `_counted` has them
        self._left: dict[Tensor, Place] = {}  # of those taken out of the groups, for when they come back
        self._counted: list[tuple[int, ...]] = []

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grad_scale: float | Tensor = 1.0,
        finite: Tensor | None = None,
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss anew, with gradients.
            grad_scale: multiplies every gradient (clipping, accumulation): a number or a one-element float32 tensor on
                the parameters' device. Where a tensor is not finite, nothing changes.
            finite: a one-element bool there; where it is False, nothing changes: no parameter, state or count of steps.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _check_scale(grad_scale)
        self._ready()
        for numbers in self._numbers.values():
            numbers.compute(grad_scale, finite)
        together = Together(self.block_size, self.seed is not None, self._launches)
        for p, (numbers, i, _) in self._place.items():
            if p.grad is None:
                continue
            found = self._tensors(p)
            if found is not None and (self._is_away(found[2]) or not together.takes(*found, numbers, i)):
                self._apply(*found, numbers.rows[i], None)
        for found, numbers, i in together.step():
            self._apply(*found, numbers.rows[i], None)
        return loss

    @torch.no_grad()
    def update(
        self, p: Tensor, group: dict[str, Any], grad_scale: float | Tensor = 1.0, finite: Tensor | None = None
    ) -> None:
        """Step one parameter from its .grad.

        Args:
            p: a parameter of this optimizer.
            group: its parameter group.
            grad_scale: multiplies the gradient, as in `step`. The numbers of all parameters are made together, so the
                updates of one step should share it.
            finite: a one-element bool on p's device; where it is False, nothing changes.
        """
        if p.grad is None:
            raise ValueError("update needs p.grad; it is None")
        _check_scale(grad_scale)
        place = self._place.get(p)
        # All groups are compared once a step, not once a parameter: a row that was used belongs to the step before.
        if capturing() or place is None or place[2] is not group or place[0].used(place[1]):
            self._ready()
        else:
            self._send()
        if p not in self._place or self._place[p][2] is not group:
            raise ValueError("update needs a parameter of this optimizer and the parameter group that holds it")
        numbers, i, _ = self._place[p]
        row, found = numbers.row_for(i, grad_scale), self._tensors(p)
        if found is not None:
            self._apply(*found, row, finite)

    def prepare(self) -> None:
        """Send rates, betas and decays to the device where they changed; it does not wait.

        Every step does this by itself, but for one that a CUDA graph replays: call it before each replay.
        """
        if self._counted != self._held():
            self._count_anew()
        self._send()

    def _send(self) -> None:
        for numbers in self._numbers.values():
            numbers.fill(self.param_groups)
        for launches in filter(None, self._launches.values()):
            launches.send()

    def _ready(self) -> None:
        if not capturing():
            self.prepare()
        elif self._away is not None:
            raise RuntimeError("streamed states cannot be captured in a CUDA graph. Fix: AdamW8bit(states='device')")
        elif not self._place:
            raise RuntimeError("AdamW8bit has nothing to capture yet. Fix: take one step before the CUDA graph")
        elif self._counted != self._held():
            raise RuntimeError("AdamW8bit's param_groups have changed. Fix: take one step before the CUDA graph")
        else:
            self._in_graphs += [n for n in self._numbers.values() if n not in self._in_graphs]

    def _held(self) -> list[tuple[int, ...]]:
        """Which parameters the groups hold: param_groups may be edited by hand, as torch's optimizers allow."""
        return [(id(group), *map(id, group["params"])) for group in self.param_groups]

    def _count_anew(self) -> None:
        """Rows of numbers for all parameters, each with the count that it has; a new parameter begins at 0."""
        before = self._left | self._place
        self._numbers, self._place = {}, {}
        everyone = [(p, g) for g, group in enumerate(self.param_groups) for p in group["params"]]
        for device in dict.fromkeys(p.device for p, _ in everyone):
            mine = [(place, p, g) for place, (p, g) in enumerate(everyone) if p.device == device]
            groups, places = [g for _, _, g in mine], [place for place, _, _ in mine]
            numbers = StepNumbers(device, groups, places, self.seed, self.decay_first)
            numbers.take_counts({i: before[p][:2] for i, (_, p, _) in enumerate(mine) if p in before})
            self._numbers[device] = numbers
            self._place |= {p: (numbers, i, self.param_groups[g]) for i, (_, p, g) in enumerate(mine)}
            if self._away is not None:
                largest = max(own_part(p).numel() for _, p, _ in mine)
                self._away.make_room({device: largest})
        self._left = {p: place for p, place in before.items() if p in self.state and p not in self._place}
        self._counted = self._held()

    def _tensors(self, p: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]] | None:
        """(value, gradient, state) as their memory lies; None where this process has no part of p."""
        assert p.grad is not None
        if p.grad.is_sparse:
            raise ValueError("p.grad is sparse, which AdamW8bit does not take. Fix: Embedding(sparse=False)")
        part, part_grad = own_part(p), own_part(p.grad)
        if not part.numel():
            return None
        state = self.state[p]
        if not state:
            self._init_state(part, state)
        return in_memory_order(part, part), in_memory_order(part, part_grad).contiguous(), state

    def _apply(self, value: Tensor, grad: Tensor, state: dict[str, Any], row: Tensor, finite: Tensor | None) -> None:
        """The op on one parameter."""
        stochastic, ops = self.seed is not None, torch.ops.pcs_kernels
        if state["state1"].dtype != torch.uint8:
            states = state["state1"], state["state2"]
            ops.adamw32bit_step(value, grad, *states, row, finite, stochastic, forced_backend())
            return
        maps, rest = (state["qmap1"], state["qmap2"]), (self.block_size, stochastic, forced_backend())
        if self._away is None:
            ops.adamw8bit_step(value, grad, *(state[name] for name in CODED), *maps, row, finite, *rest)
            return
        with self._away.lent(state, value.device) as coded:
            ops.adamw8bit_step(value, grad, *coded, *maps, row, finite, *rest)

    def _is_away(self, state: dict[str, Any]) -> bool:
        return self._away is not None and state["state1"].dtype == torch.uint8

    def finish(self) -> None:
        """Let the host wait until streamed states are in the machine's memory, before it reads them."""
        if self._away is not None:
            self._away.finish()

    def _init_state(self, p: Tensor, state: dict[str, Any]) -> None:
        if capturing():
            raise RuntimeError("a parameter has no optimizer state yet. Fix: take one step before the CUDA graph")
        dtype = torch.uint8 if p.numel() >= self.min_8bit_size else torch.float32
        like, contiguous = in_memory_order(p, p), torch.contiguous_format
        if dtype == torch.float32:
            state["state1"] = torch.zeros_like(like, dtype=dtype, memory_format=contiguous)
            state["state2"] = torch.zeros_like(like, dtype=dtype, memory_format=contiguous)
            return
        if self._away is not None:
            self._away.make_room({p.device: p.numel()})  # it may have grown
            self._away.keep_only(self.state.values())
        home, count = self._home(p.device), blocks(p.numel(), self.block_size)
        for number, signed in ((1, True), (2, False)):
            zero = int((code_map(signed) == 0).nonzero()[0])
            codes = torch.full(like.shape, zero, dtype=dtype, device=home)
            scales = torch.zeros(count, dtype=torch.float32, device=home)
            state[f"state{number}"] = self._kept(codes, p.device)
            state[f"qmap{number}"] = device_map(signed, p.device)
            state[f"absmax{number}"] = self._kept(scales, p.device)

    def _home(self, device: torch.device) -> torch.device:
        """Where the coded states are of parameters on a device."""
        return device if self._away is None else torch.device("cpu")

    def _kept(self, t: Tensor, device: torch.device) -> Tensor:
        return t if self._away is None else on_the_host(t, device)

    def _loaded(self, saved: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """A copy of a saved state of a parameter on a device."""
        coded = saved["state1"].dtype == torch.uint8
        homes = dict.fromkeys(CODED if coded else (), self._home(device))
        found = {name: loaded(name, value, homes.get(name, device)) for name, value in saved.items()}
        return found | {name: self._kept(found[name], device) for name in homes}

    def state_dict(self) -> dict[str, Any]:
        """As bitsandbytes has it, with each parameter's count of steps, which is read from its device here."""
        if self._counted != self._held():
            self._count_anew()
        self.finish()
        left = {p: self.state.pop(p) for p in self._left}  # torch has no number for what no group holds
        try:
            saved = super().state_dict()
        finally:
            self.state.update(left)
        steps = self._steps()
        everyone = [p for group in self.param_groups for p in group["params"]]
        saved["state"] = {key: {"step": steps[everyone[key]], **state} for key, state in saved["state"].items()}
        return saved

    def _steps(self) -> dict[Tensor, int]:
        """Each parameter's count, read from its device."""
        places = self._left | self._place
        counts = {numbers: numbers.counts.tolist() for numbers in dict.fromkeys(place[0] for place in places.values())}
        return {p: counts[numbers][i] for p, (numbers, i, _) in places.items()}

    def _take_steps(self, steps: dict[Tensor, int]) -> None:
        """Numbers for all parameters made anew, with these counts; none is 0."""
        self._place, self._left, self._counted = {}, {}, []
        self.prepare()
        for numbers in self._numbers.values():
            mine = [steps.get(p, 0) for p, (its, _, _) in self._place.items() if its is numbers]
            numbers.counts.copy_(torch.tensor(mine, dtype=torch.int32))

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: what was asked for, states, groups and counts; no buffers of a device's steps."""
        self.finish()
        names = ("block_size", "min_8bit_size", "seed", "decay_first", "states")
        asked = {name: getattr(self, name) for name in names}
        return super().__getstate__() | asked | {"steps": self._steps()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        steps = state["steps"]
        state.setdefault("states", "device")  # of a pickle that is older than the choice
        super().__setstate__({name: value for name, value in state.items() if name != "steps"})
        self._begin()
        for p, its in self.state.items():
            its.update(self._loaded(its, p.device))
        held = {p for group in self.param_groups for p in group["params"]}
        left, groups = [p for p in self.state if p not in held], self.param_groups
        if left:  # of no group: they have one until their counts are theirs, and `prepare` then keeps them apart
            self.param_groups = [*groups, self.defaults | {"params": left}]
        self._take_steps(steps)
        self.param_groups = groups

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of bitsandbytes' AdamW8bit; codes and scales keep their dtypes.

        Raises:
            ValueError: where parameter groups, block size or memory format differ from the saved ones.
        """
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        sizes, saved_sizes = ([len(g["params"]) for g in gs] for gs in (groups, saved_groups))
        if sizes != saved_sizes:
            raise ValueError(f"state_dict has parameter groups of {saved_sizes} tensors, this optimizer of {sizes}")
        ours = [p for g in groups for p in g["params"]]
        theirs = [key for g in saved_groups for key in g["params"]]
        found, steps = {}, {}
        for p, key in zip(ours, theirs, strict=True):
            if key in state_dict["state"]:
                saved = dict(state_dict["state"][key])
                saved.update(saved.pop(BNB_NESTED, {}))
                check_saved_state(saved, own_part(p), key, self.block_size)
                steps[p] = int(saved.pop("step"))
                found[p] = self._loaded(saved, p.device)
        if self._away is not None:
            self._away.forget()
        self.state.clear()
        self.state.update(found)
        for group, saved_group in zip(groups, saved_groups, strict=True):
            group.update({k: deepcopy(v) for k, v in saved_group.items() if k != "params"})
        self._take_steps(steps)


def _check_scale(grad_scale: float | Tensor) -> None:
    if isinstance(grad_scale, Tensor):
        if grad_scale.numel() != 1:
            raise ValueError(f"grad_scale must be a number or a tensor of one element, not {tuple(grad_scale.shape)}")
    elif not math.isfinite(grad_scale):
        raise ValueError(f"grad_scale must be a finite number, not {grad_scale}")
