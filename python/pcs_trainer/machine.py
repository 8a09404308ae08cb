"""What this machine computes with: the backend of the operations, the training precision, the device."""

from __future__ import annotations

import torch

from pcs_kernels import diagnostics


def device_name(kind: str) -> str:
    """The GPU's name for kind "cuda"; else "CPU, N threads"."""
    return torch.cuda.get_device_name() if kind == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def training_dtype(kind: str) -> tuple[torch.dtype, str]:
    """The dtype to train in on this machine.

    Args:
        kind: "cuda" or "cpu".

    Returns:
        The dtype, and the reason in one phrase.
    """
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name = f"this GPU (compute capability {major}.{minor})"
        if major >= 8:
            return torch.bfloat16, f"{name} multiplies bfloat16 at full rate"
        if "GTX 16" in torch.cuda.get_device_name():  # github.com/pytorch/pytorch/issues/58123, open since 2021
            return torch.float32, "GeForce GTX 16 cards compute NaN in float16, and have no bfloat16"
        if major == 7:
            return torch.float16, f"{name} multiplies float16 at full rate and has no bfloat16"
        return torch.float32, f"{name} has no bfloat16, and no fast float16"
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16, "this CPU multiplies bfloat16 directly"
    return torch.float32, "this CPU would compute bfloat16 by way of float32, more slowly"


def planning_dtype(kind: str) -> tuple[torch.dtype, str]:
    """`training_dtype`, also for a GPU that is not in this machine: then what those since 2020 train in."""
    if kind == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16, "there is no GPU here, and those since compute capability 8.0 train in it"
    return training_dtype(kind)


def native_build() -> tuple[str, bool]:
    """The native build in words, or why there is none; and whether there is one."""
    build = diagnostics.native_build()
    if build.instruction_set is None:
        return build.reason, False
    return f"native build for {build.instruction_set}", True


def kernels() -> tuple[str, bool]:
    """The backend of the operations in words, and whether it is plain torch (the reference) alone."""
    forced = diagnostics.forced_backend()
    if forced:
        return f"the {forced} backend, as PCS_BACKEND says", forced == "reference"
    if diagnostics.device_type() == "cuda":
        reason = diagnostics.triton_reason()
        return (f"plain torch (the reference): {reason}", True) if reason else ("Triton kernels", False)
    said, native = native_build()
    return (said, False) if native else (f"plain torch (the reference): {said}", True)


def slow_note() -> str:
    """A one-line warning for runs on the reference backend alone; "" where kernels run."""
    said, plain = kernels()
    return f"Everything works, but slower than it could: the operations run on {said}" if plain else ""
