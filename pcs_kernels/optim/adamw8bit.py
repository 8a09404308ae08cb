"""AdamW with 8-bit states: 2 bytes of optimizer state a parameter instead of 8.

The decoupled weight decay comes before the update, as in torch.optim.AdamW and bitsandbytes on the CPU; bitsandbytes
on CUDA applies it after (decay_first=False matches that, exactly). States have bitsandbytes' layout and names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from .._layout import in_memory_order
from ..ops.adamw8bit import step_8bit, step_32bit
from ..ops.adamw8bit.codes import blocks, code_map

# bitsandbytes nests the coded state under this key since 0.46, so that FSDP leaves it alone.
_BNB_NESTED = "__bnb_optimizer_quant_state__"


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
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number that is not negative, not {value}")
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), not {betas}")
        if not (16 <= block_size <= 4096) or block_size & (block_size - 1):
            raise ValueError(f"block_size must be a power of two from 16 to 4096, not {block_size}")
        self.block_size = block_size
        self.min_8bit_size = min_8bit_size
        self.seed = seed
        self.decay_first = decay_first
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay))
        self._order: dict[Tensor, int] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, grad_scale: float = 1.0) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss anew, with gradients.
            grad_scale: multiplies every gradient (clipping, accumulation).

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group, grad_scale)
        return loss

    @torch.no_grad()
    def update(self, p: Tensor, group: dict[str, Any], grad_scale: float = 1.0) -> None:
        """Step one parameter from its .grad.

        Args:
            p: a parameter of this optimizer.
            group: its parameter group.
            grad_scale: multiplies the gradient.
        """
        if p.grad is None:
            raise ValueError("update needs p.grad; it is None")
        if p.grad.is_sparse:
            raise ValueError("p.grad is sparse, which AdamW8bit does not take. Fix: Embedding(sparse=False)")
        part, part_grad = own_part(p), own_part(p.grad)
        if not part.numel():
            return
        state = self.state[p]
        if not state:
            self._init_state(part, state)
        state["step"] += 1
        numbers = (group["lr"], *group["betas"][:2], group["eps"], group["weight_decay"], int(state["step"]))
        # a prime above any number of parameters: no two pairs of seed and parameter draw the same bits
        seed = None if self.seed is None else self.seed * 1_000_003 + self._index(p)
        value, grad = in_memory_order(part, part), in_memory_order(part, part_grad).contiguous()
        if state["state1"].dtype == torch.uint8:
            names = ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2")
            coded = (state[name] for name in names)
            step_8bit(value, grad, *coded, *numbers, self.block_size, grad_scale, seed, self.decay_first)
        else:
            step_32bit(value, grad, state["state1"], state["state2"], *numbers, grad_scale, seed, self.decay_first)

    def _index(self, p: Tensor) -> int:
        """The parameter's place among all groups: each draws its own random bits."""
        if p not in self._order:
            everyone = [q for group in self.param_groups for q in group["params"]]
            self._order = {q: i for i, q in enumerate(everyone)}
        return self._order[p]

    def _init_state(self, p: Tensor, state: dict[str, Any]) -> None:
        state["step"] = 0
        dtype = torch.uint8 if p.numel() >= self.min_8bit_size else torch.float32
        like, contiguous = in_memory_order(p, p), torch.contiguous_format
        if dtype == torch.float32:
            state["state1"] = torch.zeros_like(like, dtype=dtype, memory_format=contiguous)
            state["state2"] = torch.zeros_like(like, dtype=dtype, memory_format=contiguous)
            return
        for number, signed in ((1, True), (2, False)):
            qmap = code_map(signed).to(p.device)
            zero = int((qmap == 0).nonzero()[0])
            state[f"state{number}"] = torch.full_like(like, zero, dtype=dtype, memory_format=contiguous)
            state[f"qmap{number}"] = qmap
            state[f"absmax{number}"] = torch.zeros(
                blocks(p.numel(), self.block_size), dtype=torch.float32, device=p.device
            )

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
        loaded = {}
        for p, key in zip(ours, theirs, strict=True):
            if key in state_dict["state"]:
                saved = dict(state_dict["state"][key])
                saved.update(saved.pop(_BNB_NESTED, {}))
                _check_saved_state(saved, own_part(p), key, self.block_size)
                loaded[p] = {k: v.to(p.device).clone() if isinstance(v, Tensor) else v for k, v in saved.items()}
        self.state.clear()
        self.state.update(loaded)
        for group, saved_group in zip(groups, saved_groups, strict=True):
            group.update({k: deepcopy(v) for k, v in saved_group.items() if k != "params"})


def own_part(t: Tensor) -> Tensor:
    """This process's part of a tensor that several share (a DTensor), or the tensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def _check_saved_state(saved: dict[str, Any], p: Tensor, key: Any, block_size: int) -> None:
    for name in ("state1", "state2"):
        if name not in saved or saved[name].numel() != p.numel():
            raise ValueError(f"state_dict: {name} of parameter {key} does not fit its {tuple(p.shape)} elements")
        memory = tuple(in_memory_order(p, p).shape)
        if saved[name].ndim == 4 and tuple(saved[name].shape) != memory:
            raise ValueError(
                f"state_dict: {name} of parameter {key} was saved from another memory format than the parameter's. "
                "Fix: give the parameter the same one (contiguous or channels_last) before loading"
            )
        number = name[-1]
        if saved[name].dtype == torch.uint8:
            wanted = blocks(p.numel(), block_size)
            if saved.get(f"absmax{number}", p.new_empty(0)).numel() != wanted or f"qmap{number}" not in saved:
                raise ValueError(
                    f"state_dict: absmax{number} of parameter {key} must hold {wanted} blocks of {block_size}"
                )
