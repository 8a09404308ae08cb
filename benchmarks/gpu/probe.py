"""What the machine has, and whether the first things work: what every later failure is read beside."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import platform
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.gpu.row import Absent, Machine, Row, output_of

PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "transformers", "safetensors", "diffusers")
PACKAGES += ("bitsandbytes", "xformers", "torchao", "pillow", "rich")
COMPILERS = ("cc", "gcc", "clang")  # Triton compiles its launcher with the first that it finds


def nvidia_smi(machine: Machine) -> dict[str, Any]:
    asked = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,power.limit"
    lines = output_of(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"]).strip().splitlines()
    return {"lines": lines, "said": lines[-1]}


def compiler(machine: Machine) -> dict[str, Any]:
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise Absent(f"none of {', '.join(COMPILERS)} is on the PATH: Triton cannot build its launcher")
    return {"path": found, "said": output_of([found, "--version"]).splitlines()[0]}


def python_header(machine: Machine) -> dict[str, Any]:
    path = Path(sysconfig.get_path("include")) / "Python.h"
    if not path.is_file():
        raise Absent("Python.h is not installed: Triton cannot build its launcher")
    return {"said": f"Python.h of {platform.python_version()} is there"}


def git(machine: Machine) -> dict[str, Any]:
    return {"said": output_of(["git", "--version"]).strip()}


def versions(machine: Machine) -> dict[str, Any]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {"versions": found, "said": ", ".join(f"{name} {version}" for name, version in found.items())}


def card(machine: Machine) -> dict[str, Any]:
    if machine.smoke:
        raise Absent("no GPU is asked with --smoke")
    p = torch.cuda.get_device_properties(0)
    facts = {
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "cudnn": torch.backends.cudnn.version(),
    }
    return {**facts, "said": f"{p.name}, {facts}"}


def backends(machine: Machine) -> dict[str, Any]:
    """python -m pcs_kernels: in a process of its own, as it is the first thing that a person types."""
    lines = output_of([sys.executable, "-m", "pcs_kernels"]).splitlines()
    return {"lines": lines, "said": "\n" + "\n".join(lines)}


def doctor(machine: Machine) -> dict[str, Any]:
    """pcs doctor: every op's error against the reference, on this device."""
    from pcs_trainer.cli.entry import main as pcs

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = pcs(["doctor"])
    if code:
        raise RuntimeError(f"pcs doctor ended with {code}: {' '.join(out.getvalue().split())[-300:]}")
    return {"lines": out.getvalue().splitlines(), "said": "\n" + out.getvalue().rstrip()}


def first_kernel(machine: Machine) -> dict[str, Any]:
    """The smallest Triton kernel: whether anything compiles, loads and runs here, without a kernel of ours."""
    if machine.smoke:
        raise Absent("no Triton kernel runs on the CPU")
    from benchmarks.gpu.first_kernel import doubled

    x = torch.arange(1000.0, device="cuda")
    if not torch.equal(doubled(x), 2 * x):
        raise RuntimeError("a Triton kernel that doubles its input gives other values")
    return {"said": "a Triton kernel compiles and runs"}


def rates(machine: Machine) -> dict[str, Any]:
    """bf16 matmul and device copy: the ceilings that other numbers are compared with."""
    n = 256 if machine.smoke else 8192
    a, b = (torch.randn(n, n, device=machine.device).bfloat16() for _ in range(2))
    big = torch.randn(n * n * (1 if machine.smoke else 4), device=machine.device)
    seconds = timing.interleave({"matmul": lambda: a @ b, "copy": lambda: big.clone()}, rounds=5)
    found = {
        "bf16_tflops": 2 * n**3 / sorted(seconds["matmul"])[2] / 1e12,
        "copy_tb_per_s": 2 * big.nbytes / sorted(seconds["copy"])[2] / 1e12,
    }
    said = f"{found['bf16_tflops']:.2f} TFLOP/s bf16, {found['copy_tb_per_s']:.3f} TB/s copied"
    return {**found, "said": said}


def rows(smoke: bool) -> list[Row]:
    asked = (nvidia_smi, compiler, python_header, git, versions, card, first_kernel, backends, doctor, rates)
    return [Row(ask.__name__.replace("_", " "), ask) for ask in asked]
