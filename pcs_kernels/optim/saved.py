"""Saved states of AdamW8bit: read from its own files and bitsandbytes', and checked before they are taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._layout import in_memory_order
from ..ops.adamw8bit.codes import blocks, device_map, is_dynamic

# bitsandbytes nests the coded state under this key since 0.46, so that FSDP leaves it alone.
BNB_NESTED = "__bnb_optimizer_quant_state__"


def loaded(name: str, value: Any, device: torch.device) -> Any:
    """A copy of a saved value on its parameter's device; the dynamic map is the one that all there share."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(device).clone()
    if name in ("qmap1", "qmap2") and is_dynamic(value, name == "qmap1"):
        return device_map(name == "qmap1", value.device)
    return value


def own_part(t: Tensor) -> Tensor:
    """This process's part of a tensor that several share (a DTensor), or the tensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def check_saved_state(saved: dict[str, Any], p: Tensor, key: Any, block_size: int) -> None:
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
