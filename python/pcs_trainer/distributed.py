"""Several processes that train together: under torchrun each takes its part of a batch, and the first one writes."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 16_000_000  # numbers whose gradients travel in one message


def join() -> tuple[int, int]:
    """(rank, world size); a process that torchrun has started joins the others first."""
    if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    return share()


def local_rank() -> int:
    """This process's number on its machine: its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def share() -> tuple[int, int]:
    """(rank, world size) of this process among those that train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process does what is inside before the others: they find what it has kept."""
    rank, world = share()
    if world > 1 and rank:
        dist.barrier()
    yield
    if world > 1 and not rank:
        dist.barrier()


def agreed(wish: bool) -> bool:
    """Whether any of the processes wishes it: all of them stop after the same step."""
    if share()[1] == 1:
        return wish
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor([float(wish)], device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def share_gradients(trained: list[nn.Parameter]) -> None:
    """The mean of all processes' gradients; what had none in one process counts as zero."""
    world, waiting = share()[1], []
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
