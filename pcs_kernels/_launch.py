"""Launching Triton kernels: what each GPU architecture allows, and the launches of a call without a GPU.

Every Triton implementation calls `launch`. Under `recording(arch)` nothing runs: each launch is kept as an `AotCase`,
specialized exactly as Triton's JIT would, so that the ahead-of-time tests compile what a real call would compile.
There is no CUDA call at import time, and no autotuning: launch tables are plain data, deterministic and enumerable.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from . import _probe
from ._relaunch import run

# Triton 3.2 and 3.3, of torch 2.6 and 2.7, have no knobs: their interpreter asks the environment
INTERPRETED = (
    bool(triton.knobs.runtime.interpret)
    if hasattr(triton, "knobs")
    else os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
)

KIB = 1024
# architecture -> shared memory that one thread block may use: CUDA programming guide, technical specifications
SHARED_LIMIT = {
    75: 64 * KIB,
    80: 163 * KIB,
    86: 99 * KIB,
    89: 99 * KIB,
    90: 227 * KIB,
    100: 227 * KIB,
    120: 99 * KIB,
}
# architecture -> multiprocessors of one card of it, for recordings: T4, A100, A40, RTX 4090, H100, B200, RTX 5090
# (NVIDIA's data sheets). Other cards of an architecture have fewer (RTX 3060: 28); a real tensor's card is asked.
MULTIPROCESSORS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
AOT_ARCHS = (80, 86, 89, 90, 100, 120)  # every tabled one that runs all kernels: what the tests compile for
MIN_DOT_ARCH = 80  # Triton 3.3 dropped the tensor cores of older cards: tl.dot compiles to plain arithmetic on them

# AMD's architectures, numbered by their names (gfx942 -> 0x942), above every number of NVIDIA's. 64 KiB of local memory
# a workgroup: AMD's instruction set documents of CDNA2, CDNA3, RDNA2 and RDNA3. Compute units: MI210, MI300X, RX 6800
# XT and RX 7900 XTX (AMD's data sheets).
AMD = {0x90A: 104, 0x942: 304, 0x1030: 72, 0x1100: 96}
AMD_WITHOUT_DOTS = (0x1030,)  # RDNA2 has no matrix instructions: tl.dot compiles to plain arithmetic
SHARED_LIMIT |= dict.fromkeys(AMD, 64 * KIB)
MULTIPROCESSORS |= AMD

_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AotCase:
    """One kernel specialization: what triton.compile needs, named for a reader."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]

    @property
    def key(self) -> str:
        """Equal for equal machine code: the name is left out."""
        parts = (self.fn.__name__, self.signature, self.constexprs, sorted(self.attrs), self.options)
        return repr(parts)


@dataclass
class _Recorder:
    arch: int
    cases: list[AotCase] = field(default_factory=list)


_recorder: _Recorder | None = None
_reached: Sequence[Tensor] = ()  # of the running launch: what it touches by addresses in a table


class Arch(int):
    """An architecture of the tables that knows the multiprocessors of its own card."""

    processors: int

    def __new__(cls, number: int, processors: int) -> Arch:
        arch = super().__new__(cls, number)
        arch.processors = processors
        return arch


def arch_name(arch: int) -> str:
    """As its maker names it: sm_86, gfx942."""
    return f"gfx{arch:x}" if arch in AMD else f"sm_{arch}"


def processors(arch: int) -> int:
    """Multiprocessors of the card where `arch` is one's, else the tabled ones of its architecture."""
    return arch.processors if isinstance(arch, Arch) else MULTIPROCESSORS[arch]


def known_arch(capability: int) -> int:
    """The tabled NVIDIA architecture whose limits hold for `capability` (87 -> 86, 103 -> 100)."""
    nvidia = [arch for arch in SHARED_LIMIT if arch not in AMD]
    return max((arch for arch in nvidia if arch <= capability), default=min(nvidia))


def known_amd(name: str) -> int:
    """The tabled AMD architecture for a device's name, such as "gfx942:sramecc+:xnack-"; unknown ones go by family."""
    try:
        number = int(name.split(":")[0].removeprefix("gfx"), 16)
    except ValueError:
        return 0x1030
    if number in AMD:
        return number
    if number < 0x1000:  # CDNA; MI300 and later have at least what MI300 has
        return 0x942 if number > 0x942 else 0x90A
    return 0x1100 if number >= 0x1100 else 0x1030


@functools.cache
def _cuda_arch(index: int) -> Arch:
    card = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Arch(known_amd(card.gcnArchName), card.multi_processor_count)
    major, minor = torch.cuda.get_device_capability(index)
    return Arch(known_arch(10 * major + minor), card.multi_processor_count)


def current_arch(device: torch.device) -> int:
    """The architecture (80, 86, ...) of a CUDA device or of the recording; 80 in the interpreter."""
    if _recorder is not None:
        return _recorder.arch
    if device.type == "cuda":
        return _cuda_arch(torch.cuda.current_device() if device.index is None else device.index)
    return 80  # the interpreter has no architecture; one of those that run every kernel


def unavailable(x: Tensor, dots: bool) -> str | None:
    """Why Triton cannot take tensors like x at all, in one sentence; None when it can."""
    return unavailable_for(x.device, x.dtype, dots)


def unavailable_for(device: torch.device, dtype: torch.dtype, dots: bool) -> str | None:
    """`unavailable` of a tensor on this device in this dtype."""
    if device.type == "meta" and _recorder is not None:
        return arch_reason(_recorder.arch, dots)
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return "triton needs a CUDA tensor; set TRITON_INTERPRET=1 before the import to interpret on the CPU"
    if dtype not in _DTYPES:
        return f"the triton kernels take float32, float16 and bfloat16, not {dtype}; cast, or use the reference"
    if device.type == "cpu":
        if dots and dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 matrices wrongly; interpret in float32 or float16"
        return None
    return arch_reason(current_arch(device), dots) or _launch_reason(device)


def _launch_reason(device: torch.device) -> str | None:
    """Why no kernel can be launched on a CUDA device, or None; the first question launches one there."""
    if INTERPRETED or _recorder is not None:
        return None
    return _probe.reason(torch.cuda.current_device() if device.index is None else device.index)


def arch_reason(arch: int, dots: bool) -> str | None:
    """Why an architecture cannot run the kernels (those with matrix products when `dots`), or None."""
    if dots and arch in AMD_WITHOUT_DOTS:
        return f"{arch_name(arch)} is unsupported: it has no matrix instructions; use the reference"
    if dots and arch < MIN_DOT_ARCH:
        return (
            f"{arch_name(arch)} is unsupported: Triton has no tensor-core path below sm_{MIN_DOT_ARCH}, so matrix"
            " products would run on plain arithmetic; use the reference"
        )
    return None


def blocks(total: int, block: int) -> int:
    """How many blocks cover `total`: the quotient rounded up."""
    return -(-total // block)


def stages_that_fit(most: int, arch: int, needed: Callable[[int], int]) -> int:
    """The most stages of loads, up to `most`, whose shared memory the architecture has; 1 where none fit.

    Args:
        most: stages to begin with.
        arch: a tabled architecture.
        needed: stages -> bytes of shared memory, or an upper bound.
    """
    return next((stages for stages in range(most, 1, -1) if needed(stages) <= SHARED_LIMIT[arch]), 1)


def shared_reason(needed: int, arch: int, what: str) -> str | None:
    """Why a kernel that takes `needed` bytes of shared memory cannot run on an architecture, or None."""
    limit = SHARED_LIMIT[arch]
    if needed <= limit:
        return None
    return f"{what} would take {needed} bytes of shared memory and {arch_name(arch)} has {limit}; use the reference"


def pow2(n: int) -> int:
    """The least power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def split_width(width: int, least: int = 16) -> tuple[int, int]:
    """Cover a width by a power of two and a smaller one: 40 -> (32, 16), 77 -> (64, 16), 64 -> (64, 0).

    Args:
        width: of a head, or a number of tokens.
        least: the smallest part; 16 is the least dimension of a `tl.dot`.
    """
    if width <= least:
        return least, 0
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    second = max(pow2(rest), least) if rest else 0
    return (first, second) if second < first else (2 * first, 0)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    reached: Any = (),
    **constexprs: Any,
) -> None:
    """Run (or record) one kernel on the device of its first tensor.

    Args:
        kernel: a function under `triton.jit`.
        grid: programs along each axis.
        *args: in the kernel's order.
        num_warps: as Triton takes it.
        num_stages: as Triton takes it.
        reached: the tensors that the kernel touches by addresses in a table, for who runs kernels without a GPU.
        **constexprs: the kernel's `tl.constexpr` arguments by name.
    """
    global _reached
    if _recorder is not None:
        _recorder.cases.append(_specialized(kernel, args, constexprs, num_warps, num_stages))
        return
    first = args[0] if isinstance(args[0], Tensor) else next(a for a in args if isinstance(a, Tensor))
    device = first.device
    _reached = reached
    try:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                run(kernel, grid, args, num_warps, num_stages, constexprs)
        else:
            run(kernel, grid, args, num_warps, num_stages, constexprs)
    finally:
        _reached = ()


def _specialized(
    kernel: Any, args: tuple[Any, ...], constexprs: dict[str, Any], num_warps: int, num_stages: int
) -> AotCase:
    """What Triton's JIT makes of these arguments: 1 and None are constants, multiples of 16 are marked."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    values = dict(zip(kernel.arg_names, args, strict=False)) | constexprs
    for i, (name, param) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        special = not param.do_not_specialize
        if param.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPE_NAMES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return AotCase(kernel.__name__, kernel, signature, constants, attrs, options)


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[AotCase]]:
    """Inside, launches on meta tensors are kept as AotCases for `arch` and nothing runs."""
    global _recorder
    before, _recorder = _recorder, _Recorder(arch)
    try:
        yield _recorder.cases
    finally:
        _recorder = before


def record(arch: int, label: str, call: Callable[[], Any]) -> list[AotCase]:
    """The cases of one call, named `kernel label`."""
    with recording(arch) as cases:
        call()
    return [AotCase(f"{c.name} {label}", c.fn, c.signature, c.constexprs, c.attrs, c.options) for c in cases]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory, for recorded calls."""
    return torch.empty(shape, dtype=dtype, device="meta")
