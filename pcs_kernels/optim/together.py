"""The tensors of one step that Triton takes in one launch, sorted by what a launch has in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._dispatch import forced_backend
from ..ops.adamw8bit.codes import is_dynamic
from ..ops.adamw8bit.op import OP
from .step_numbers import StepNumbers, capturing

if TYPE_CHECKING:  # Triton is imported where it runs
    from ..ops.adamw8bit.many import Entry, Many

CODED = ("state1", "state2", "absmax1", "absmax2")
Kind = tuple[torch.device, torch.dtype, torch.dtype, bool]  # device, parameter's and gradient's type, 8 bits
Launches = dict[Kind, "Many"]


class Together:
    """Collects the tensors of one step.

    Args:
        block_size: of the 8-bit states.
        stochastic: whether 16 bits are rounded stochastically.
        launches: of the steps before, by kind; new ones are added.
    """

    def __init__(self, block_size: int, stochastic: bool, launches: Launches) -> None:
        self.block_size, self.stochastic, self.launches = block_size, stochastic, launches
        self._entries: dict[Kind, tuple[StepNumbers, list[Entry]]] = {}

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
        self._entries.setdefault(kind, (numbers, []))[1].append(entry)
        return True

    def step(self) -> None:
        """One launch for each kind."""
        if not self._entries:
            return
        from ..ops.adamw8bit.many import Many

        for kind, (numbers, entries) in self._entries.items():
            if kind not in self.launches:
                self.launches[kind] = Many(self.block_size if kind[3] else None, self.stochastic)
            self.launches[kind].step(entries, numbers.floats, capturing())
