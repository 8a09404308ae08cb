"""Selective activation recomputation: the mechanism under the memory plans.

`rebuilt(fn, *inputs, then=use)` is `use(fn(*inputs))`, exactly, with other memory: what `use` would keep of fn's
results is computed again from fn's inputs when the backward asks for it. With `whole=True` so is everything fn itself
keeps. One second run serves every tensor asked for; what is kept instead are the inputs.

Units of C x N kept by a transformer block with frozen weights:

    keep_all, eager               17   what the ops keep
    rebuild_norms, A              17   the same; where weights train, normalized and gated values are computed again
    rebuild_feedforward, B         9   rebuild_norms, and the feed-forward's first projection is computed again
    rebuild_around_attention, C    3   the block's input, its hidden state and the self-attention's output
    rebuild_all, checkpoint        1   the input alone
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .plans import PLAN_NAMES as PLAN_NAMES
from .plans import PLANS as PLANS
from .plans import short_plan as short_plan


class _Keep(torch.autograd.Function):
    """A node outside the graph whose saved tensors are a second run's inputs: counted and version-checked like any."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        """Keep the tensors; `anchor` requires a gradient, without which autograd would make no node."""
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise AssertionError("the node that keeps a second run's inputs is never part of a backward")


class _Enough(Exception):
    """Everything that was asked for has been found: the second run may stop."""


class _SecondRun:
    """Runs fn(*inputs) again, once, when a tensor that was not kept is asked for."""

    def __init__(self, fn: Callable[..., Any], whole: bool) -> None:
        self.fn = fn
        self.whole = whole
        self.needs: list[bool] = []
        self.kept: Any = None
        self.packed = 0  # tensors that fn saved in its first run
        self.uses = 0  # times that `then` saved one of fn's results
        self.uses_left = 0
        self.saved: dict[int, Tensor] = {}
        self.results: list[Tensor] | None = None

    def keep(self, inputs: tuple[Tensor, ...]) -> None:
        """Hold the inputs, if anything may be asked for."""
        if self.packed or self.uses:
            self.needs = [t.requires_grad for t in inputs]
            self.kept = _Keep.apply(torch.empty(0, requires_grad=True), *inputs).grad_fn

    def pack_inside(self, tensor: Tensor) -> Any:
        """Count a tensor that fn saves, in its place in the order, and let go of it."""
        if _stays(tensor):
            return tensor
        self.packed += 1
        return self, self.packed - 1

    def run(self) -> list[Any]:
        """Compute fn again, for everything that may be asked for: what it saved, and its results."""
        self.saved.clear()
        self.uses_left = self.uses
        kept = zip(self.kept.saved_tensors, self.needs, strict=True)
        inputs = [t.detach().requires_grad_(needs) for t, needs in kept]
        if not self.whole:
            with torch.no_grad():
                self.results = _as_list(self.fn(*inputs))
            return self.results

        def pack(tensor: Tensor) -> Any:
            if _stays(tensor):
                return tensor
            self.saved[len(self.saved)] = tensor.detach()
            if not self.uses and len(self.saved) == self.packed:
                raise _Enough  # the rest of fn would make only its results, and nobody asks for them
            return None

        try:
            with torch.enable_grad(), saved_tensors_hooks(pack, lambda packed: packed):
                results = _as_list(self.fn(*inputs))
            self.results = [r.detach() if isinstance(r, Tensor) else r for r in results] if self.uses else None
        except _Enough:
            pass
        return self.results or []

    def take_inside(self, position: int) -> Tensor:
        """The tensor that fn saved at this place of the order."""
        if position not in self.saved:
            self.run()
        return self.saved.pop(position)

    def take_result(self, position: int) -> Tensor:
        """One of fn's results; the last use lets go of them."""
        result = (self.run() if self.results is None else self.results)[position]
        self.uses_left -= 1
        if self.uses_left == 0:
            self.results = None
        return result


def _stays(tensor: Tensor) -> bool:
    """Whether it is in memory anyway: a parameter, or a view of one (torch's products save the transposed weight)."""
    return isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)


def _as_list(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple) else [results]


def _unpack_inside(packed: Any) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed[0].take_inside(packed[1])


def rebuilt(fn: Callable[..., Any], *inputs: Tensor, then: Callable[..., Any], whole: bool = False) -> Any:
    """Compute then(fn(*inputs)) with less kept for the backward.

    Args:
        fn: what is computed again; its results and saved tensors depend on `inputs` and parameters alone.
        inputs: what is kept instead of fn's results.
        then: what follows, and is not computed again.
        whole: what fn itself saves is not kept either.

    Returns:
        The same as then(fn(*inputs)), and the same gradients.
    """
    if not torch.is_grad_enabled():
        return then(*_as_list(fn(*inputs)))
    second = _SecondRun(fn, whole)
    if whole:
        with saved_tensors_hooks(second.pack_inside, _unpack_inside):
            results = _as_list(fn(*inputs))
    else:
        results = _as_list(fn(*inputs))
    # a result that `then` saves is recognized by its storage: it may save a view of it
    storages = {r.untyped_storage()._cdata: i for i, r in enumerate(results) if isinstance(r, Tensor)}

    def pack(tensor: Tensor) -> Any:
        if _stays(tensor):
            return tensor
        position = storages.get(tensor.untyped_storage()._cdata)
        if position is None:
            return tensor
        second.uses += 1
        return second, position, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        run, position, size, stride, offset = packed
        return run.take_result(position).as_strided(size, stride, offset)

    with saved_tensors_hooks(pack, unpack):
        answer = then(*results)
    second.keep(inputs)
    return answer


def direct(fn: Callable[..., Any], *inputs: Tensor, then: Callable[..., Any]) -> Any:
    """then(fn(*inputs)), keeping whatever the ops keep: `rebuilt` for the plan that keeps all."""
    return then(*_as_list(fn(*inputs)))
