"""What this machine computes with: the backend of the operations, the training precision, the device."""

from __future__ import annotations

import torch

from pcs_kernels import diagnostics

DEVICES = "cpu, cuda, cuda:1, xpu or mps"


def device_problem(device: torch.device | str) -> str | None:
    """Why this device cannot be used here, in one sentence; None where it can."""
    try:
        asked = torch.device(device)
    except RuntimeError:
        return f"unknown device {str(device)!r}; give {DEVICES}"
    if asked.type in ("cpu", "meta"):
        return None
    if not diagnostics.is_there(asked.type):
        what = "GPU" if asked.type == "cuda" else f"{asked.type} device"
        return f"PyTorch sees no {what} here (pcs doctor says what it sees). Fix: use the device cpu"
    count = 1 if asked.type == "mps" else torch.get_device_module(asked).device_count()
    if (asked.index or 0) >= count:
        return f"there is no {asked} here: PyTorch sees {count} of the kind {asked.type!r}, counted from 0"
    return None


def untested(kind: str) -> str:
    """What to know of a kind of device beside CPU and CUDA; "" for these two."""
    if kind in ("cpu", "cuda", "meta"):
        return ""
    return f"{kind} is untested: every operation runs as PyTorch's own, attention as scaled_dot_product_attention"


def device_name(kind: str) -> str:
    """The GPU's name for kind "cuda"; "CPU, N threads"; else the kind."""
    if kind not in ("cpu", "cuda"):
        return kind
    return torch.cuda.get_device_name() if kind == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def training_dtype(kind: str) -> tuple[torch.dtype, str]:
    """The dtype to train in on this machine.

    Args:
        kind: of the device, such as "cuda".

    Returns:
        The dtype, and the reason in one phrase.
    """
    if untested(kind):
        return torch.float32, f"nobody has measured the others on {kind}"
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


def kernels(kind: str = "") -> tuple[str, bool]:
    """The backend of the operations in words, and whether it is plain torch (the reference) alone.

    Args:
        kind: of the device that is used; default: the GPU where there is one, else the CPU.
    """
    kind = kind or diagnostics.device_type()
    forced = diagnostics.forced_backend()
    if forced:
        return f"the {forced} backend, as PCS_BACKEND says", forced == "reference"
    if untested(kind):
        return f"plain torch (the reference): there are no kernels for {kind}", True
    if kind == "cuda":
        reason = diagnostics.triton_reason()
        return (f"plain torch (the reference): {reason}", True) if reason else ("Triton kernels", False)
    said, native = native_build()
    return (said, False) if native else (f"plain torch (the reference): {said}", True)


def slow_note(kind: str = "") -> str:
    """A one-line warning for runs on the reference backend alone; "" where kernels run. `kind` is as in `kernels`."""
    said, plain = kernels(kind)
    return f"Everything works, but slower than it could: the operations run on {said}" if plain else ""
