"""The C++ build for this CPU, and the only place where tensors become addresses.

Five builds of the same sources ship on x86-64 (baseline, AVX2, AVX-512, that with bf16, and with AMX's matrix tiles); a
probe picks one at first use. PCS_NATIVE names another for tests, one that this CPU can run.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

SETS = ("baseline", "avx2", "avx512f", "avx512", "amx")  # each CPU that runs one runs those before it
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in csrc/tensor_view.h


@functools.cache
def instruction_set() -> str:
    """The build to use: what PCS_NATIVE names, else the best for this CPU that an old compiler did not leave out."""
    best = importlib.import_module("pcs_kernels._cpuid").best()
    wanted = os.environ.get("PCS_NATIVE") or best
    if wanted not in SETS:
        raise ImportError(f"PCS_NATIVE is {wanted!r}; choose one of {', '.join(SETS)}")
    if SETS.index(wanted) > SETS.index(best):
        raise ImportError(f"PCS_NATIVE is {wanted!r} but this CPU runs {best!r} at most")
    if os.environ.get("PCS_NATIVE"):
        return wanted
    built = [name for name in SETS[: SETS.index(best) + 1] if importlib.util.find_spec(f"pcs_kernels._native_{name}")]
    return built[-1] if built else wanted


@functools.cache
def library() -> ModuleType:
    """The compiled module; ImportError in one sentence where there is none."""
    try:
        module = importlib.import_module(f"pcs_kernels._native_{instruction_set()}")
    except ModuleNotFoundError:
        if os.environ.get("PCS_NATIVE") and importlib.util.find_spec("pcs_kernels._cpuid"):
            raise ImportError(f"PCS_NATIVE is {os.environ['PCS_NATIVE']!r}, which was not built") from None
        raise ImportError(
            "the C++ kernels were not built (no compiler at install time). Fix: install g++ and run pip install again"
        ) from None
    functions = _openmp_of_torch()
    if functions is not None:
        module.use_openmp(*functions)
    return module


def _openmp_of_torch() -> tuple[int, int] | None:
    """The addresses of GOMP_parallel and omp_get_thread_num in torch's OpenMP runtime; None: plain threads then work.

    Two pools of threads on the same cores would stand in each other's way.
    """
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    # libgomp, libiomp5 and libomp (of GCC, Intel and LLVM): all three answer to GOMP_parallel
    for path in glob.glob(os.path.join(folder, "lib[gio]*omp*.so*")):
        try:
            runtime = ctypes.CDLL(path)
            parallel = ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
            thread = ctypes.cast(runtime.omp_get_thread_num, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
        if parallel and thread:
            return parallel, thread
    return None


def threads() -> int:
    """How many threads a kernel may use: torch's own setting."""
    return torch.get_num_threads()


def dtype_code(x: Tensor) -> int:
    """The number by which the C++ side knows x's dtype."""
    return DTYPES[x.dtype]


def reason(*tensors: Tensor | None) -> str | None:
    """Why the native kernels cannot take these tensors, or None."""
    for x in tensors:
        if x is None:
            continue
        if x.device.type != "cpu":
            return f"native kernels run on the CPU, not on {x.device}"
        if x.dtype not in DTYPES:
            return f"native kernels take float32 and bfloat16, not {x.dtype}"
    return None


def address(x: Tensor | None) -> int:
    """The address of a contiguous tensor, 0 for None."""
    return 0 if x is None else x.data_ptr()


def heads(x: Tensor | None) -> tuple[int, int, int, int]:
    """A [B, H, N, D] tensor with unit stride on D as the C++ side takes it."""
    if x is None:
        return (0, 0, 0, 0)
    batch, head, row, _ = x.stride()
    return (x.data_ptr(), batch, head, row)


def values(p: Tensor | None) -> tuple[int, int]:
    """A small contiguous parameter of either dtype: (address, dtype)."""
    return (0, 0) if p is None else (p.data_ptr(), dtype_code(p))
