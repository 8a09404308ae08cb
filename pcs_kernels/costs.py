"""What a call of each registered op costs: its FLOPs, and the weight that its CPU kernel keeps packed.

A formula names the arguments that it reads, and the names are looked up in the op's schema: a changed order of the
arguments cannot count another tensor. The formulas stand beside the schemas, in each `ops/*/op.py`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ._dispatch import COSTS
from ._packed import may_pack

Formula = Callable[..., int]
RESULT = "result"  # the name by which a formula reads what the op returned; every other name is an argument's


@functools.cache
def formulas() -> dict[Any, Formula]:
    """FLOPs of the ops that multiply: 2 per multiply-add. Norms, gates and optimizer steps have no formula.

    Returns:
        op -> formula of its arguments and `out_val`, as `torch.utils.flop_counter.FlopCounterMode` takes them
        (`custom_mapping=formulas()`).
    """
    packets = {name: getattr(torch.ops.pcs_kernels, name) for name in COSTS}
    return {packets[name]: by_name(packets[name], cost.flops) for name, cost in COSTS.items() if cost.flops}


def by_name(packet: Any, flops: Formula) -> Formula:
    """The formula as a function of the op's arguments in the schema's order, and of `out_val`.

    Args:
        packet: a registered op, such as `torch.ops.pcs_kernels.frozen_linear_forward`.
        flops: a function whose parameters are named as the op's arguments; `result` is what the op returned.
    """
    names = tuple(inspect.signature(flops).parameters)
    unknown = [name for name in names if name != RESULT and name not in _places(packet)]
    if unknown:
        raise ValueError(f"{packet} has no argument {unknown[0]!r}; its schema is {packet.default._schema}")

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        read = {name: out_val if name == RESULT else argument(packet, name, args, kwargs) for name in names}
        return flops(**read)

    count.__dict__["_get_raw"] = True  # FlopCounterMode then passes tensors instead of their shapes
    return count


def implementation(op: Any) -> Callable[..., Any]:
    """What a registered op runs, as plain Python: its parts can then be counted one by one."""
    return COSTS[op._schema.name.partition("::")[2]].run


def packed_weight(packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, int] | None:
    """The weight of this call that the op's CPU kernel packs, and the copy's bytes; None where it packs none."""
    name = _packed_names().get(packet)
    if name is None or not argument_or(packet, "pack", args, kwargs, may_pack(direction(packet))):
        return None
    weight: Tensor = argument(packet, name, args, kwargs)
    size = COSTS[packet.__name__].packed_bytes(weight)
    return (weight, size) if size else None


def direction(packet: Any) -> Literal["forward", "backward"]:
    """Whether an op is a forward or the backward of one."""
    return "backward" if packet.__name__.endswith("backward") else "forward"


def argument_or(packet: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], otherwise: Any) -> Any:
    """`argument`, or `otherwise` of an op whose schema has no such argument."""
    return argument(packet, name, args, kwargs) if name in _places(packet) else otherwise


def argument(packet: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The value that a call of an op gives to the argument `name` of its schema."""
    return kwargs[name] if name in kwargs else args[_places(packet)[name]]


@functools.cache
def _places(packet: Any) -> dict[str, int]:
    return {a.name: place for place, a in enumerate(packet.default._schema.arguments)}


@functools.cache
def _packed_names() -> dict[Any, str]:
    return {getattr(torch.ops.pcs_kernels, name): cost.packed for name, cost in COSTS.items() if cost.packed}
