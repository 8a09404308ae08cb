"""Counting what a forward keeps for its backward, and the FLOPs of a step, without computing (fake tensors)."""

from __future__ import annotations

import contextlib

import torch
from pcs_trainer.unet.unet import UNet
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pcs_kernels
from pcs_kernels import costs


class Storages(TorchDispatchMode):
    """Every storage that an op makes, by weak reference: what is alive afterwards is what is really kept."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self, without: set[int]) -> int:
        return sum(n for key, (ref, n) in self.made.items() if key not in without and not ref.expired())


@contextlib.contextmanager
def bf16_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def call_of(config: dict, size: int) -> tuple:
    """(x, t, context, added) at batch 1 in bf16."""
    added = None
    if config.get("addition_embed_type"):
        added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.ones(1, 6)}
    x = torch.randn(1, 4, size, size)
    return x, torch.tensor([500]), torch.randn(1, 77, config["cross_attention_dim"]), added


def _owned(network: torch.nn.Module, *tensors: torch.Tensor) -> set[int]:
    derived = network.derived() if isinstance(network, UNet) else []
    return {t.untyped_storage()._cdata for t in (*network.parameters(), *derived, *tensors)}


def _kept(network: torch.nn.Module, forward, *given: torch.Tensor) -> tuple[float, float]:
    """(MB seen by saved-tensor hooks, MB of storages alive after the forward), parameters and inputs excluded."""
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(t):
        seen[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), Storages() as storages:
        y = forward()
    without = _owned(network, *given, y)
    hooked = sum(s.nbytes() for key, s in seen.items() if key not in without)
    held = {key for key in seen if key not in without}
    seen.clear()
    assert held or not y.requires_grad
    return hooked / 1e6, storages.alive(without) / 1e6


def ours_keeps(config: dict, size: int, plan, full: bool = False) -> tuple[float, float]:
    """As `_kept`, of our UNet: frozen, its text keys and values needing a gradient, or with every weight trained."""
    with FakeTensorMode(), bf16_by_default():
        unet = UNet.from_config(config).requires_grad_(full).set_plan(plan)
        x, t, context, added = call_of(config, size)
        if full:
            return _kept(unet, lambda: unet(x, t, context, added), x, context)
        with torch.no_grad():
            kv = unet.text_kv(context)
        kv = {name: (k.clone().requires_grad_(), v.clone().requires_grad_()) for name, (k, v) in kv.items()}
        return _kept(unet, lambda: unet(x, t, kv, added), x, context, *(p for pair in kv.values() for p in pair))


def peer_keeps(config: dict, size: int, full: bool = False) -> float:
    """MB that diffusers' network keeps, by hooks, with the text states needing a gradient."""
    from diffusers import UNet2DConditionModel

    with FakeTensorMode(), bf16_by_default():
        network = UNet2DConditionModel(**config).requires_grad_(full)
        x, t, context, added = call_of(config, size)
        x = x.contiguous(memory_format=torch.channels_last)
        context.requires_grad_(not full)
        return _kept(network, lambda: network(x, t, context, added_cond_kwargs=added).sample, x, context)[0]


def step_flops(config: dict, size: int, plan: str) -> tuple[int, int]:
    """(FLOPs of the forward, of forward and backward) of a frozen UNet whose text keys and values need a gradient."""
    with FakeTensorMode(), bf16_by_default(), pcs_kernels.backend("reference"):
        unet = UNet.from_config(config).requires_grad_(False).set_plan(plan)
        x, t, context, added = call_of(config, size)
        counter = FlopCounterMode(display=False, custom_mapping=costs.formulas())
        with counter:
            y = unet(x, t, context.requires_grad_(), added)
            forward = counter.get_total_flops()
            y.sum().backward()
        return forward, counter.get_total_flops()
