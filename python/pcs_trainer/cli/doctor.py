"""pcs doctor: examine this machine, the backend of each operation and its error here; one piece of advice."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import pcs_kernels
from pcs_kernels import diagnostics
from pcs_kernels.optim import AdamW8bit

from .. import machine

PACKAGES = ("torch", "triton", "numpy", "safetensors", "diffusers", "transformers", "bitsandbytes", "xformers")
FLOOR = 8 * torch.finfo(torch.float32).eps  # what another order of a sum may change, where the reference errs by less
TINY = 1e-30  # below every float32: a result that is 0 everywhere has no relative error
# of a learning rate; state codes that are all off by one move a parameter by 0.02 on average and by 0.11 at most
OPTIMIZER_ALLOWED = 0.05


@dataclass
class OpState:
    """One op: the backend that runs, why each other one does not, and its error against the reference."""

    name: str
    backend: str
    others: dict[str, str] = field(default_factory=dict)
    error: float | None = None  # relative, of the worst output or gradient; None where the reference itself runs
    allowed: float = 0.0

    @property
    def wrong(self) -> bool:
        return self.error is not None and not self.error <= self.allowed


@dataclass
class Diagnosis:
    device: str
    kind: str  # cuda or cpu
    dtype: torch.dtype
    dtype_reason: str
    native: str  # the instruction set of the native build, or why there is none
    has_native: bool
    versions: dict[str, str]
    ops: list[OpState]
    advice: str
    others: list[str] = field(default_factory=list)  # kinds of devices that torch sees beside it, untested

    @property
    def well(self) -> bool:
        return self.advice.startswith("All good")


class Trial(NamedTuple):
    """A small call of an op: the function of its inputs, and float64 inputs."""

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: list[Tensor]


def _trials() -> dict[str, Trial]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    kernel, matrix = normal(24, 16, 3, 3, scale=0.08), normal(48, 64, scale=0.125)
    capture = torch.rand(1, 2, 77, generator=generator)

    def with_maps(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        chosen = capture.to(q.device, torch.promote_types(q.dtype, torch.float32))
        out, maps = pcs_kernels.cross_attention(q, k, v, chosen)
        assert maps is not None
        return out, maps

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pcs_kernels.group_norm_silu(x, 8, weight, bias)

    codes = pcs_kernels.quantize_weight(normal(48, 100, scale=0.1))

    def residual(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return pcs_kernels.lowrank_residual(x, matrix.to(x), None, down, up)

    def conv(x: Tensor) -> Tensor:
        return pcs_kernels.frozen_conv2d(x, kernel.to(x), None, 1, 1)

    def eight_bits(x: Tensor) -> Tensor:
        return pcs_kernels.frozen_linear(x, pcs_kernels.Int8Weight(*(t.to(x.device) for t in codes)))

    # odd sizes (63 rows, 77 tokens, 130 queries, 14 x 11 pixels) reach the kernels' partial tiles
    return {
        "geglu": Trial(pcs_kernels.geglu, [normal(63, 128)]),
        "group_norm_silu": Trial(norm, [normal(2, 64, 7, 9), normal(64), normal(64)]),
        "cross_attention": Trial(with_maps, [normal(1, 2, n, 40) for n in (63, 77, 77)]),
        "self_attention": Trial(pcs_kernels.self_attention, [normal(1, 2, 130, 40) for _ in range(3)]),
        "lowrank_residual": Trial(residual, [normal(2, 63, 64), normal(4, 64, scale=0.125), normal(48, 4)]),
        "frozen_conv": Trial(conv, [normal(2, 16, 14, 11)]),
        "int8_weight": Trial(eight_bits, [normal(63, 100)]),
    }


def _results(
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: list[Tensor],
    dtype: torch.dtype,
    compute: torch.dtype,
    kind: str,
) -> list[Tensor]:
    """Outputs and gradients, of values rounded to `dtype`."""
    leaves = [x.to(dtype).to(kind, compute).requires_grad_() for x in inputs]
    outputs = call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(y.shape, generator=generator).to(dtype).to(y) for y in outputs]
    torch.autograd.backward(outputs, seeds)
    gradients = [x.grad for x in leaves if x.grad is not None]
    return [t.detach().double().cpu() for t in (*outputs, *gradients)]


def _worst(results: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a - e).abs().max() / e.abs().max().clamp_min(TINY)) for a, e in zip(results, exact, strict=True))


def op_error(name: str, dtype: torch.dtype, kind: str) -> tuple[float, float]:
    """Compare an op's outputs and gradients with the float64 reference.

    Args:
        name: of the op.
        dtype: of the call.
        kind: "cuda" or "cpu".

    Returns:
        The relative error of the backend that runs here, and what is allowed: twice the reference's in the same dtype.
    """
    if name == "adamw8bit":
        return _optimizer_error(kind)
    call, inputs = _trials()[name]
    with pcs_kernels.backend("reference"):
        exact = _results(call, inputs, dtype, torch.float64, "cpu")
        plain = _results(call, inputs, dtype, dtype, kind)
    ours = _results(call, inputs, dtype, dtype, kind)
    return _worst(ours, exact), 2 * _worst(plain, exact) + FLOOR


def _optimizer_error(kind: str) -> tuple[float, float]:
    """Three steps of a float32 parameter: the difference from the reference, in learning rates; what is allowed."""
    rate = 1e-2

    def stepped() -> Tensor:
        generator = torch.Generator().manual_seed(2)
        p = torch.nn.Parameter(torch.randn(4096, generator=generator).to(kind))
        optimizer = AdamW8bit([p], lr=rate)
        for _ in range(3):
            p.grad = torch.randn(4096, generator=generator).to(kind)
            optimizer.step()
        return p.detach().cpu()

    with pcs_kernels.backend("reference"):
        exact = stepped()
    return float((stepped() - exact).abs().max()) / rate, OPTIMIZER_ALLOWED


def _op_states(dtype: torch.dtype, kind: str) -> list[OpState]:
    found: dict[str, OpState] = {}
    for verdict in diagnostics.verdicts():
        state = found.setdefault(verdict.op, OpState(verdict.op, "reference"))
        if verdict.runs:
            state.backend = verdict.backend
        else:
            state.others[verdict.backend] = verdict.text.removeprefix("off: ")
    for state in found.values():
        if state.backend != "reference":
            state.error, state.allowed = op_error(state.name, dtype, kind)
    return list(found.values())


def _advice(kind: str, has_native: bool, ops: list[OpState], nvidia: bool, triton: str | None) -> str:
    """The one thing to do; of several, the gravest. `triton` is why no Triton kernel runs, or None."""
    wrong = [op.name for op in ops if op.wrong]
    if wrong:
        return f"{wrong[0]} errs more than it may on this machine: set PCS_BACKEND=reference, and please report it."
    if kind == "cpu" and nvidia:
        return "This machine has an NVIDIA driver, but torch sees no GPU: install a build of torch with CUDA."
    if kind == "cuda" and triton:
        return f"On this GPU the operations run as plain torch: {triton}"
    if kind == "cpu" and not has_native:
        return "Install a C++ compiler (g++) and reinstall: without it everything works, at the speed of plain torch."
    if os.environ.get("PCS_BACKEND"):
        return f"PCS_BACKEND forces {os.environ['PCS_BACKEND']!r}: unset it to let each operation choose."
    return "All good: nothing to do."


def examine() -> Diagnosis:
    """Examine device, precision, native build, packages and every operation; takes a second or two."""
    kind = diagnostics.device_type()
    dtype, reason = machine.training_dtype(kind)
    native, has_native = machine.native_build()
    versions = {"pcs": pcs_kernels.__version__, "Python": sys.version.split()[0]}
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            versions[package] = "not installed"
        else:
            versions[package] = torch.__version__ if package == "torch" else _version(package)
    ops = _op_states(dtype, kind)
    advice = _advice(kind, has_native, ops, shutil.which("nvidia-smi") is not None, diagnostics.triton_reason())
    name, others = machine.device_name(kind), diagnostics.other_devices()
    return Diagnosis(name, kind, dtype, reason, native, has_native, versions, ops, advice, others)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"


def report(found: Diagnosis | None = None) -> str:
    """Format a diagnosis for a terminal.

    Args:
        found: the diagnosis; default: `examine()`.
    """
    found = found or examine()
    lines = [f"device     {found.device}", f"precision  {str(found.dtype)[6:]}: {found.dtype_reason}"]
    lines += [f"also here  --device {kind}: {machine.untested(kind)}" for kind in found.others]
    lines += [f"kernels    {found.native}"]
    lines += ["versions   " + ", ".join(f"{name} {version}" for name, version in found.versions.items()), ""]
    lines += [f"{'operation':<18}{'runs on':<11}error against the reference"]
    for op in found.ops:
        error = "it is the reference" if op.error is None else f"{op.error:.1e} (allowed {op.allowed:.1e})"
        lines += [f"{op.name:<18}{op.backend:<11}{error}{'  WRONG' if op.wrong else ''}"]
    lines += ["", "why not another backend:"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for op in found.ops:
        for backend, reason in op.others.items():
            reasons.setdefault((backend, reason), []).append(op.name)
    for (backend, reason), names in sorted(reasons.items()):
        whose = "all" if len(names) == len(found.ops) else ", ".join(names)
        lines += [f"  {backend} ({whose}): {reason}"]
    return "\n".join([*lines, "", found.advice])
