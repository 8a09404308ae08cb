"""python -m pcs_kernels: which backend each op runs on this machine, and why the others are off."""

from __future__ import annotations

import importlib.util
import sys

import torch

from . import __version__, _native
from ._dispatch import BACKENDS, OPS
from .ops.self_attention.op import flash_reason, xformers_reason


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def example(op: str) -> tuple[object, ...]:
    """Small arguments of an everyday call on this machine's device, as `reason` looks at them."""
    device = device_type()
    x = torch.ones(2, 64, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    picture, heads = x.view(1, 8, 4, 4), x.view(1, 2, 8, 8)
    return {
        "geglu": (x,),
        "group_norm_silu": (picture, 4, None, None, 1e-5, True),
        "cross_attention": (heads, heads, heads, None, 0.3),
        "self_attention": (heads, heads, heads, 0.3),
        "lowrank_residual": (x, x.t() @ x, None, x, x.t(), None, 1.0, None),
        "frozen_conv": (picture, picture.view(2, 4, 4, 4)),
        "adamw8bit": (x, x),
    }[op]


def rows() -> list[tuple[str, str, str]]:
    """(op, backend, verdict) for every op and backend."""
    found = []
    for name, op in sorted(OPS.items()):
        arguments = example(name)
        reasons = {backend: op.why_not(backend, *arguments) for backend in BACKENDS}
        order = op.order.get(device_type(), ("reference",))
        chosen = next(backend for backend in order if reasons[backend] is None)
        for backend in BACKENDS:
            if backend == chosen:
                verdict = "runs"
            elif reasons[backend] is not None:
                verdict = f"off: {reasons[backend]}"
            else:
                verdict = f"ready when forced: {chosen} comes first here"
            found.append((name, backend, verdict))
    flash = flash_reason(torch.bfloat16, 64) if device_type() == "cuda" else "the native kernel comes first on the CPU"
    found.append(("self_attention", "sdpa", f"ready when forced: {flash}" if flash else "runs"))
    found.append(("self_attention", "xformers", f"off: {xformers_reason(device_type())}"))
    return found


def main() -> None:
    try:
        _native.library()
        native = f"native build {_native.instruction_set()}"
    except ImportError as error:
        native = str(error)
    triton = "triton installed" if importlib.util.find_spec("triton") else "triton not installed"
    device = torch.cuda.get_device_name() if device_type() == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    python = sys.version.split()[0]
    print(f"pcs_kernels {__version__}, torch {torch.__version__}, Python {python}, {device}; {native}; {triton}\n")
    for op, backend, verdict in rows():
        print(f"{op:<18}{backend:<11}{verdict}")


if __name__ == "__main__":
    main()
