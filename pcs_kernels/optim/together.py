"""The tensors of one step that Triton takes in one launch, sorted by what a launch has in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._dispatch import forced_backend
from .._fallback import launch_reason, tell_once
from ..ops.adamw8bit.codes import is_dynamic
from ..ops.adamw8bit.op import OP
from .away import CODED
from .step_numbers import StepNumbers, capturing

if TYPE_CHECKING:  # Triton is imported where it runs
    from ..ops.adamw8bit.many import Entry, Many

Kind = tuple[torch.device, torch.dtype, torch.dtype, bool]  # device, parameter's and gradient's type, 8 bits
Found = tuple[Tensor, Tensor, dict[str, Any]]  # value, gradient, state
Launches = dict[Kind, "Many | None"]  # None: the card has no room for the kernel


class Together:
    """Collects the tensors of one step.

    Args:
        block_size: of the 8-bit states.
        stochastic: whether 16 bits are rounded stochastically.
        launches: of the steps before, by kind; new ones are added.
    """

    def __init__(self, block_size: int, stochastic: bool, launches: Launches) -> None:
        self.block_size, self.stochastic, self.launches = block_size, stochastic, launches
        self._entries: dict[Kind, tuple[StepNumbers, list[Entry], list[Found]]] = {}

    def takes(self, value: Tensor, grad: Tensor, state: dict[str, Any], numbers: StepNumbers, i: int) -> bool:
        """Whether this parameter will be stepped by a launch of many; otherwise it needs the single op."""
        if value.device.type != "cuda" and forced_backend() != "triton":
            return False
        if not OP.select(forced_backend(), value.device.type, value, grad).__name__.endswith("triton_impl"):
            return False
        from ..ops.adamw8bit.many import Entry, fits

        coded = state["state1"].dtype == torch.uint8
        if coded and not (is_dynamic(state["qmap1"], True) and is_dynamic(state["qmap2"], False)):
            return False
        states = tuple(state[name] for name in (CODED if coded else CODED[:2]))
        entry = Entry(value, grad, states, i)
        if not fits(entry):
            return False
        kind = value.device, value.dtype, grad.dtype, coded
        if kind in self.launches and self.launches[kind] is None:
            return False
        _, entries, given = self._entries.setdefault(kind, (numbers, [], []))
        entries.append(entry)
        given.append((value, grad, state))
        return True

    def step(self) -> list[tuple[Found, StepNumbers, int]]:
        """One launch for each kind; the tensors of a kind that cannot be launched so, to be stepped one by one."""
        left: list[tuple[Found, StepNumbers, int]] = []
        if not self._entries:
            return left
        from ..ops.adamw8bit.many import Many

        for kind, (numbers, entries, given) in self._entries.items():
            many = self.launches.setdefault(kind, Many(self.block_size if kind[3] else None, self.stochastic))
            assert many is not None
            try:
                many.step(entries, numbers.floats, capturing())
            except Exception as error:
                reason = launch_reason(error)
                if reason is None or forced_backend():
                    raise
                tell_once(("adamw8bit many", kind), f"adamw8bit steps each tensor by itself: {reason}")
                self.launches[kind] = None
                left += [(found, numbers, entry.row) for found, entry in zip(given, entries, strict=True)]
        return left
