"""Full fine-tuning in several processes: each keeps its part of every tensor, gradient and optimizer state (FSDP2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .distributed import share
from .unet.layers import Conv2d

if TYPE_CHECKING:
    from .methods import Learner
    from .unet.unet import UNet

ALONE = 1_000_000  # a convolution of so many weights is gathered by itself; all the rest together


def shard(unet: UNet, learner: Learner) -> None:
    """Give each process its part of the UNet; the learner's parameters are then the parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(unet.conv_in.weight.device.type, (share()[1],))
    sums = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in unet.modules():
        if isinstance(layer, Conv2d) and layer.kernel_size != (1, 1) and layer.weight.numel() >= ALONE:
            fully_shard(layer, mesh=mesh, mp_policy=sums)
    fully_shard(unet, mesh=mesh, mp_policy=sums, reshard_after_forward=True)
    register_fsdp_forward_method(unet, "text_kv")
    parts = {f"unet.{name}": p for name, p in unet.named_parameters()}
    learner.parameters = {name: parts.get(name, p) for name, p in learner.parameters.items()}


def is_part(t: Tensor) -> bool:
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """The tensor from all processes' parts; every process asks at the same time."""
    return t.full_tensor() if is_part(t) else t  # type: ignore[attr-defined]


@torch.no_grad()
def fill(p: nn.Parameter, value: Tensor) -> None:
    """Copy a whole tensor's values into a parameter, or into this process's part of it."""
    if is_part(p):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(p.device, p.dtype), p.device_mesh, p.placements)
    p.copy_(value)


def norm_of(gradients: list[Tensor]) -> float:
    """The norm of all gradients together, the parts of other processes included."""
    import torch.distributed as dist

    def squares(tensors: list[Tensor]) -> Tensor:
        return torch.stack([t.float().norm().square() for t in tensors]).sum() if tensors else torch.zeros(())

    parts = [g.to_local() for g in gradients if is_part(g)]  # type: ignore[attr-defined]
    total = squares([g for g in gradients if not is_part(g)])
    if parts:
        elsewhere = squares(parts)
        dist.all_reduce(elsewhere)
        total = total.to(elsewhere) + elsewhere
    return float(total.sqrt())


def gathered(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Every process's own state in the order of their ranks, for the first process; nothing for the others."""
    import torch.distributed as dist

    rank, world = share()
    found: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, state), found)
    return found or []  # type: ignore[return-value]
