"""What each op runs on here, and why not on another backend; `python -m pcs_kernels` prints it."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from . import __version__, _native
from ._dispatch import BACKENDS as BACKENDS
from ._dispatch import NEEDS, OPS, ROCM, Op
from ._dispatch import forced_backend as forced_backend
from .ops.self_attention.op import backend_of, flash_reason, xformers_reason


class Verdict(NamedTuple):
    """One op on one backend: whether it runs, whether it would when forced, and the reason where it does not run."""

    op: str
    backend: str
    runs: bool
    ready: bool
    reason: str

    @property
    def text(self) -> str:
        """The verdict in words: "runs", "ready when forced: ..." or "off: ..."."""
        if self.runs:
            return "runs"
        return f"{'ready when forced' if self.ready else 'off'}: {self.reason}"


class NativeBuild(NamedTuple):
    """The compiled CPU kernels: their instruction set, or None and the reason."""

    instruction_set: str | None
    reason: str


UNTESTED = ("xpu", "mps")  # devices that torch knows and the ops run on, by torch's own operations; never measured


def device_type() -> str:
    """The device the ops are asked about: "cuda" where torch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def is_there(kind: str) -> bool:
    """Whether torch sees a device of this kind here."""
    if kind == "mps":
        return torch.backends.mps.is_available()
    try:
        module = torch.get_device_module(kind)
    except RuntimeError:  # torch knows no such device, or was built without it
        return False
    return bool(module.is_available())


def other_devices() -> list[str]:
    """Kinds of devices beside CPU and CUDA that torch sees here: on them the ops run as torch's own operations."""
    return [kind for kind in UNTESTED if is_there(kind)]


def op_names() -> list[str]:
    """The names of all ops with backends of their own, sorted."""
    return sorted(OPS)


def native_build() -> NativeBuild:
    """The native build that this process uses, or why there is none."""
    try:
        _native.library()
        return NativeBuild(_native.instruction_set(), "")
    except ImportError as error:
        return NativeBuild(None, str(error))


def triton_reason() -> str | None:
    """Why no Triton kernel can run in this environment, or None; on a GPU a trivial kernel is launched to know it."""
    if ROCM:
        return ROCM
    module = OPS["geglu"].module("triton")
    if isinstance(module, str):
        return module
    reason: str | None = module.reason(*example("geglu", "cuda")) if device_type() == "cuda" else None
    return reason


def example(op: str, device: str) -> tuple[object, ...]:
    """Small arguments of an everyday call, as the op's `reason` looks at them.

    Args:
        op: one of `op_names()`.
        device: "cuda" and "meta" give bfloat16 tensors, anything else float32.
    """
    x = torch.ones(2, 64, device=device, dtype=torch.bfloat16 if device in ("cuda", "meta") else torch.float32)
    image, heads = x.view(1, 8, 4, 4), x.view(1, 2, 8, 8)
    adapter: tuple[Tensor | None, ...] = (x, x.new_empty(64, 64), None, x, x.t(), None)
    return {
        "geglu": (x,),
        "group_norm_silu": (image, 4, None, None, 1e-5, True),
        "cross_attention": (heads, heads, heads, None, 0.3),
        "self_attention": (heads, heads, heads, 0.3),
        "lowrank_residual": (*adapter, 1.0, None),
        "int8_weight": (x,),
        "frozen_conv": (image, image.view(2, 4, 4, 4)),
        "adamw8bit": (x, x),
    }[op]


def verdicts(kind: str = "") -> list[Verdict]:
    """Every op on every backend, then self_attention's external backends.

    Args:
        kind: of the device, such as "cuda"; default: `device_type()`.
    """
    kind = kind or device_type()
    own = [verdict for name in op_names() for verdict in _backends_of(OPS[name], kind)]
    first = _attention(kind)
    if first == "op":
        first = next(v.backend for v in own if v.op == "self_attention" and v.runs)
    return own + _external(kind, first)


def _attention(kind: str) -> str:
    """What runs an everyday call of self_attention: "sdpa", "xformers" or "op"."""
    q = example("self_attention", kind)[0]
    assert isinstance(q, Tensor)
    return backend_of(q.device, q.dtype, q.shape[-1])


def _backends_of(op: Op, kind: str) -> list[Verdict]:
    arguments = example(op.name, kind)
    reasons = {backend: op.why_not(backend, *arguments) for backend in BACKENDS}
    order = op.order.get(kind, ("reference",))
    chosen = next(backend for backend in order if reasons[backend] is None)
    if op.name == "self_attention" and _attention(kind) != "op":
        chosen = _attention(kind)
    first = f"{chosen} comes first here"
    ready = {backend: ROCM if ROCM and backend == "triton" and kind == "cuda" else first for backend in BACKENDS}
    return [
        Verdict(op.name, backend, backend == chosen, reason is None, ready[backend] if reason is None else reason)
        for backend, reason in reasons.items()
    ]


def _external(kind: str, first: str) -> list[Verdict]:
    """self_attention's other backends beside the one that runs."""
    xformers = xformers_reason(kind)
    return [
        Verdict("self_attention", "sdpa", first == "sdpa", True, f"{first} comes first here"),
        Verdict(
            "self_attention", "xformers", first == "xformers", xformers is None, xformers or f"{first} comes first here"
        ),
    ]


def hardware() -> dict[str, dict[str, str]]:
    """The backend that an everyday call runs on, by op and hardware.

    Every backend is asked for its reason, as dispatch asks it, for each tabled GPU architecture: this needs the triton
    package, but no GPU.

    Returns:
        op -> {"CPU": backend of a float32 call, "sm_75": backend of a bfloat16 call, ...}.
    """
    from ._launch import AMD, SHARED_LIMIT, recording

    found = {name: {"CPU": _chosen(OPS[name], "cpu", "cpu")} for name in op_names()}
    for arch in (arch for arch in SHARED_LIMIT if arch not in AMD):
        with recording(arch):
            for name in op_names():
                found[name][f"sm_{arch}"] = _chosen(OPS[name], "cuda", "meta")
    return found


def _chosen(op: Op, device_type: str, device: str) -> str:
    """The backend of a call on `device_type`, asked with tensors on `device`."""
    if op.name == "self_attention" and device_type == "cuda" and flash_reason(torch.bfloat16, 64) is None:
        return "sdpa"
    arguments = example(op.name, device)
    return next(backend for backend in op.order[device_type] if op.why_not(backend, *arguments) is None)


def table() -> str:
    """The text of `python -m pcs_kernels`: versions and device, then one line for each op and backend."""
    build = native_build()
    native = f"native build {build.instruction_set}" if build.instruction_set else build.reason
    reason = triton_reason()
    triton = "triton not installed" if reason == NEEDS["triton"] else f"triton {'off' if reason else 'installed'}"
    device = torch.cuda.get_device_name() if device_type() == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    python = sys.version.split()[0]
    head = f"pcs_kernels {__version__}, torch {torch.__version__}, Python {python}, {device}; {native}; {triton}"
    return "\n".join([head, "", *(f"{v.op:<18}{v.backend:<11}{v.text}" for v in verdicts())])
