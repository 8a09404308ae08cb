"""Calling an op past torch's dispatcher, where nobody watches and the same kind of call was made before.

A registered op costs the host four things beside its kernels: torch's dispatcher and its way back into Python, the
checks of every argument, the choice of a backend, and a look at autocast. All four depend on what a call looks like
(its tensors' shapes, strides, dtypes and devices, and its numbers), which in training is the same in every step. So the
first call of a kind goes through the dispatcher, which checks and chooses, and what it chose is remembered for the
next. Whoever sees torch's operations still sees ours: under a mode (fake tensors, FLOP counters, the planner, tracing
with make_fx), a transform, a subclass of Tensor, autocast, the profiler or the compiler every call is the dispatcher's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ._replay import Repeated

KINDS = 4096  # of calls remembered for one op; beyond them all are forgotten: a network has a few hundred
TENSORS = (Tensor, torch.nn.Parameter)  # their subclasses are the dispatcher's
PLAIN = frozenset((*TENSORS, NoneType, bool, int, float, str))

_choices: list[dict[Hashable, Repeated]] = []


def forget_choices() -> None:
    """Check and choose anew in the next call of every op: needed when a backend's reason has changed."""
    for known in _choices:
        known.clear()


_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transformed = torch._C._are_functorch_transforms_active
_autocast = torch._C._is_any_autocast_enabled
_traced = torch._C._get_tracing_state
_profiled = torch.autograd._profiler_enabled


def watched() -> bool:
    """Whether somebody sees or changes torch's operations now."""
    return changed() or bool(_profiled())


def changed() -> bool:
    """`watched`, but for the profiler, which changes nothing."""
    return bool(_dispatch_modes() or _function_modes() or _transformed() or _autocast() or _traced() is not None)


def kind_of(args: tuple[Any, ...]) -> Hashable | None:
    """What checks and choices depend on, the same for calls of one kind; None for a call that is the dispatcher's.

    The types are part of it: 1, 1.0 and True are equal, and only one of them is an integer.
    """
    types = tuple(map(type, args))
    if not PLAIN.issuperset(types):
        return None
    try:
        return types, *[
            (a.shape, a.stride(), a.dtype, a.device, a.layout, a.is_neg()) if kind in TENSORS else a
            for kind, a in zip(types, args, strict=True)
        ]
    except RuntimeError:  # of a layout without strides: the checks have a sentence for it
        return None


NUMBERS = {"int": int, "float": float, "bool": bool}


def _memorable(packet: Any, args: tuple[Any, ...]) -> bool:
    """Whether the dispatcher hands these on as they are: it makes a float of an integer where the schema says so, and
    negates what is lazily negated. Meta tensors are left to it too: recordings give them a device."""
    for a, declared in zip(args, packet.default._schema.arguments, strict=True):
        if isinstance(a, Tensor):
            if a.is_neg() or a.is_meta:
                return False
        elif type(a) is not NUMBERS.get(str(declared.type), type(a)):
            return False
    return True


def caller(packet: Callable[..., Any], choose: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """The registered op as a function that goes past the dispatcher where it may.

    Args:
        packet: the op, such as `torch.ops.pcs_kernels.geglu_forward`.
        choose: checks the arguments and gives the implementation that takes them, by what `kind_of` sees alone.
        run: runs that implementation on the arguments.
    """
    known: dict[Hashable, Repeated] = {}
    _choices.append(known)

    def call(*args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or watched():
            return packet(*args)
        kind = kind_of(args)
        if kind is None:
            return packet(*args)
        repeated = known.get(kind)
        if repeated is not None:
            return repeated(*args)
        result = packet(*args)
        if _memorable(packet, args):
            if len(known) >= KINDS:
                known.clear()
            known[kind] = Repeated(run, choose(*args))
        return result

    return call
