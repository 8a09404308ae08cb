"""What a CUDA graph does, on the CPU: a step's operations are kept while it runs, and done again with the same memory.

As in a graph, nothing of Python is repeated. A number that was read from Python, a tensor made from it, or a branch
that was taken stays as it was, and so do the addresses: an operation reads again what lies there now.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import pcs_kernels


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A tensor's memory and not the tensor: `p.data = ...` gives it another.
        given = tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs))
        out = func(*args, **kwargs)
        if not _only_looks(func):
            self.kept.append((func, *given, tree_map_only(Tensor, torch.Tensor.detach, out)))
        return out


def _only_looks(func: Any) -> bool:
    """A view: its memory is that of what it looks at."""
    aliases = [r.alias_info for r in func._schema.returns]
    return func.is_view or (bool(aliases) and all(a is not None and not a.is_write for a in aliases))


class Recorder:
    """As `CudaGraphs`; recording does the work, too."""

    runs = True

    def __init__(self) -> None:
        self.operations = 0

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        with _Tape() as tape:
            result = run()
        self.operations = len(tape.kept)

        @torch.no_grad()
        def replay() -> None:
            # On the CPU kernels keep packed copies of weights until these are written to; a write by a replayed
            # operation does not show, as the tensors that it was kept with count their writes by themselves.
            pcs_kernels.forget_packed_weights()
            for func, args, kwargs, out in tape.kept:
                again = func(*args, **kwargs)
                for ours, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(ours, Tensor) and ours.data_ptr() != new.data_ptr():
                        ours.copy_(new)

        return replay, result
