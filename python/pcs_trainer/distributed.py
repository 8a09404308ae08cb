"""Several processes that train together: under torchrun each takes its part of a batch, and the first one writes.

For full fine-tuning each keeps its part of every tensor, gradient and optimizer state (FSDP2): `shard`, `full_value`.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .errors import TrainingStopped

BUCKET = 16_000_000  # numbers whose gradients travel in one message
# How long the others wait for the first process: hundreds of class images may take hours, and torch's own limits for a
# message are 10 minutes (NCCL) and 30 (gloo).
WAIT = timedelta(hours=24)
ALONE = 1_000_000  # a convolution of so many weights is gathered by itself; all the rest together


def join() -> tuple[int, int]:
    """(rank, world size); a process that torchrun has started joins the others first."""
    if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    return rank_and_world()


def local_rank() -> int:
    """This process's number on its machine: its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) of this process among those that train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def first_alone(doing: str) -> Iterator[None]:
    """The first process does what is inside before the others: they find what it has kept.

    Args:
        doing: what is inside, for the others' sentence where the first one fails.

    Raises:
        TrainingStopped: in the others, where the first process fails; in that one the failure itself goes on.
    """
    rank, world = rank_and_world()
    if world == 1:
        yield
        return
    try:
        group = dist.new_group(backend="gloo", timeout=WAIT)
    except RuntimeError as error:  # killed while the processes were still connecting
        raise TrainingStopped(_ended(doing) if rank else f"another process ended before {doing}") from error
    try:
        if rank:
            _hear_of_the_first(group, doing)
            yield
            return
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # another process is gone already: what failed here is what counts
                dist.broadcast(torch.zeros(1), 0, group)
            raise
        dist.broadcast(torch.ones(1), 0, group)
    finally:
        dist.destroy_process_group(group)


def _hear_of_the_first(group: Any, doing: str) -> None:
    """Wait until the first process has done its part."""
    done = torch.zeros(1)
    try:
        dist.broadcast(done, 0, group)
    except RuntimeError as error:  # it was killed, and its connection is closed
        raise TrainingStopped(_ended(doing)) from error
    if not bool(done.item()):
        raise TrainingStopped(f"the first process failed while {doing} and says why; this one ends with it")


def _ended(doing: str) -> str:
    return f"the first process ended while {doing}; this one ends with it"


def any_process(wish: bool) -> bool:
    """Whether any of the processes wishes it: all of them stop after the same step."""
    if rank_and_world()[1] == 1:
        return wish
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor([float(wish)], device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def in_all_processes(found: Tensor) -> Tensor:
    """Whether something is so in all of the processes; the answer stays on the device."""
    if rank_and_world()[1] == 1:
        return found
    flag = found.float() if dist.get_backend() == "nccl" else found.float().cpu()
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return flag.to(found.device) > 0


def share_gradients(trained: list[nn.Parameter]) -> None:
    """The mean of all processes' gradients; what had none in one process counts as zero."""
    world, waiting = rank_and_world()[1], []
    for p in trained:
        waiting.append(p)
        if sum(q.numel() for q in waiting) >= BUCKET:
            _mean(waiting, world)
            waiting = []
    if waiting:
        _mean(waiting, world)


def _mean(parameters: list[nn.Parameter], world: int) -> None:
    flat = torch.cat([_gradient(p).flatten().float() for p in parameters])
    dist.all_reduce(flat)
    flat /= world
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)


def _gradient(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def shard(network: nn.Module, trained: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Give each process its part of the UNet; returns the parts of what trains, by the names they had."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(network.parameters()).device.type, (rank_and_world()[1],))
    sums = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for p in network.parameters():
        p.data = p.data.contiguous()  # FSDP2 refuses any other order of memory, such as a GPU's channels-last weights
    for layer in network.modules():
        if _is_large_convolution(layer):
            fully_shard(layer, mesh=mesh, mp_policy=sums)
    fully_shard(network, mesh=mesh, mp_policy=sums, reshard_after_forward=True)
    register_fsdp_forward_method(network, "text_kv")
    parts = {f"unet.{name}": p for name, p in network.named_parameters()}
    return {name: parts[name] for name in trained if name in parts}


def _is_large_convolution(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and weight.dim() == 4 and weight.shape[2:] != (1, 1) and weight.numel() >= ALONE


def is_part(t: Tensor) -> bool:
    """Whether a tensor is this process's part of one that several share."""
    return hasattr(t, "full_tensor")


def full_value(t: Tensor) -> Tensor:
    """The tensor from all processes' parts; every process asks at the same time."""
    return t.full_tensor() if is_part(t) else t  # type: ignore[attr-defined]


def local_part(t: Tensor) -> Tensor:
    """This process's part of a tensor that several share, or the tensor."""
    return t.to_local() if is_part(t) else t  # type: ignore[attr-defined]


def summed_over_parts(numbers: list[float], tensors: Iterable[Tensor]) -> list[float]:
    """Numbers that each process has of its parts, summed over the processes; unchanged where nothing is shared."""
    if not any(is_part(t) for t in tensors):
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


@torch.no_grad()
def fill(p: nn.Parameter, value: Tensor) -> None:
    """Copy a whole tensor's values into a parameter, or into this process's part of it."""
    if is_part(p):
        from torch.distributed.tensor import distribute_tensor

        part: Any = p  # a DTensor: torch's stubs know it as a Parameter
        value = distribute_tensor(value.to(p.device, p.dtype), part.device_mesh, part.placements)
    p.copy_(value)


def norm_of(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, the parts of other processes included; a number on their device."""

    def squares(tensors: list[Tensor]) -> Tensor:
        return torch.stack([t.float().norm().square() for t in tensors]).sum() if tensors else torch.zeros(())

    parts = [local_part(g) for g in gradients if is_part(g)]
    total = squares([g for g in gradients if not is_part(g)])
    if parts:
        elsewhere = squares(parts)
        dist.all_reduce(elsewhere)
        total = total.to(elsewhere) + elsewhere
    return total.sqrt()


def gathered_states(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Every process's own state in the order of their ranks, for the first process; nothing for the others."""
    rank, world = rank_and_world()
    found: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, state), found)
    return found or []
