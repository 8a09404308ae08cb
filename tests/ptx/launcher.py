"""A GPU of any architecture for Triton's own JIT: it compiles as for that card, and its launches are interpreted.

    with device(86) as gpu, pcs_kernels.backend("triton"):
        pcs_kernels.geglu(x)          # x on the CPU
    gpu.launches                      # what ran

The op's host code, its grid and the JIT's specialisation are the real ones. The last stage of the compiler, ptxas, is
left out: what stands in for the machine code is the PTX itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from pcs_kernels import _launch
from pcs_kernels._direct import forget_choices

from . import arithmetic, bitwise, control, matrix, transfers, warpgroup  # noqa: F401 - they register instructions
from .global_memory import GlobalMemory
from .machine import Blocks
from .parse import Kernel, parse
from .traffic import Traffic
from .written import Written, bytes_of

OPS = ("geglu", "group_norm_silu", "cross_attention", "self_attention", "lowrank_residual", "adamw8bit", "frozen_conv")
OPS += ("int8_weight",)
LANES = 8192  # threads at once: more of them cost memory, fewer cost Python


@dataclass
class Launch:
    kernel: Kernel
    ptx: str
    grid: tuple[int, int, int]
    shared_bytes: int
    executed: Counter[str]  # instructions, of all batches of programs
    programs: int  # how many ran
    tensor_bytes: int  # of the tensors it was given, one by one
    traffic: Traffic | None

    @property
    def code(self) -> str:
        """Equal for equal code: without the names of architecture and version, and without lines of Python."""
        body = self.ptx[self.ptx.index(".entry") :].split("\n}")[0]
        lines = (line.split("//")[0].rstrip() for line in body.split("\n"))
        return "\n".join(line for line in lines if not line.lstrip().startswith(".loc"))


@dataclass
class Gpu:
    """What a test asks of the device, and what ran on it.

    architecture: 80, 86, ...
    copies_land_late: when their group is waited for; else at once.
    first_program_only: for counting at real sizes; values then mean nothing, and memory of other programs is no fault.
    count_traffic: sectors and passes of every access.
    multiprocessors: of the card; 1 makes the launch tables choose their largest tiles.
    only_compile: keep what would be launched, run nothing.
    change: of the PTX before it is parsed: a mutant.
    """

    architecture: int
    copies_land_late: bool = True
    first_program_only: bool = False
    count_traffic: bool = False
    multiprocessors: int | None = None
    only_compile: bool = False
    change: Callable[[str], str] | None = None
    launches: list[Launch] = field(default_factory=list)
    written: Written = field(default_factory=Written)

    def run(
        self, ptx: str, grid: tuple[int, int, int], shared_bytes: int, arguments: list[tuple[str, Tensor | float]]
    ) -> None:
        """One launch; `arguments` are the kernel's with their types in Triton's spelling, constants left out."""
        kernel = _parsed(ptx if self.change is None else self.change(ptx))
        programs = np.arange(1 if self.first_program_only else int(np.prod(grid)))
        tensor_bytes = sum(x.numel() * x.element_size() for _, x in arguments if isinstance(x, Tensor))
        launch = Launch(kernel, ptx, grid, shared_bytes, Counter(), len(programs), tensor_bytes, None)
        launch.traffic = Traffic() if self.count_traffic else None
        self.launches.append(launch)
        if self.only_compile:
            return
        memory, given = self._bind(kernel, arguments)
        at_once = max(1, LANES // kernel.threads)
        for start in range(0, len(programs), at_once):
            batch = programs[start : start + at_once]
            late, traffic = self.copies_land_late, launch.traffic
            blocks = Blocks(kernel, given, grid, batch, memory, shared_bytes, late, traffic)
            blocks.run()
            launch.executed += blocks.executed
        memory.copy_back()

    def _bind(self, kernel: Kernel, given: list[tuple[str, Tensor | float]]) -> tuple[GlobalMemory, dict[str, int]]:
        """The tensors' memory, and each parameter's bits; Triton's own trailing parameters, its scratch, are null."""
        storages: dict[int, int] = {}
        tensors: list[tuple[Any, Any]] = []
        for value in (*(value for _, value in given), *_launch._reached):
            if isinstance(value, Tensor) and value.numel():
                storage = value.untyped_storage()
                if storage._cdata not in storages:
                    storages[storage._cdata] = len(tensors)
                    known = None if self.first_program_only else self.written.of(storage)
                    tensors.append((bytes_of(storage), known))
        memory = GlobalMemory(tensors, watch_programs=not self.first_program_only)
        for table in (value for _, value in given):  # addresses become those of this memory
            if _launch._reached and isinstance(table, Tensor) and table.dtype == torch.int64:
                place = {t.data_ptr(): t for t in _launch._reached}
                words = tensors[storages[table.untyped_storage()._cdata]][0].copy().view(np.int64)
                for at, word in enumerate(words):
                    if (found := place.get(int(word))) is not None:
                        offset = found.storage_offset() * found.element_size()
                        words[at] = memory.address(storages[found.untyped_storage()._cdata]) + offset
                memory.show(storages[table.untyped_storage()._cdata], words.view(np.uint8))
        numbers = []
        for kind, value in given:
            if isinstance(value, Tensor):
                index = storages.get(value.untyped_storage()._cdata)
                offset = value.storage_offset() * value.element_size()
                numbers.append(0 if index is None else memory.address(index) + offset)
            elif kind == "fp32":
                numbers.append(struct.unpack("<I", struct.pack("<f", value))[0])
            else:
                numbers.append(int(value))
        numbers += [0] * (len(kernel.parameters) - len(numbers))
        return memory, dict(zip(kernel.parameters, numbers, strict=True))


@functools.lru_cache(maxsize=256)
def _parsed(ptx: str) -> Kernel:
    return parse(ptx)


class _Driver:
    """What Triton's runtime asks of a driver. It keeps kernels by device: the number is the architecture."""

    def __init__(self, gpu: Gpu) -> None:
        architecture = gpu.architecture
        self.get_current_device = lambda: architecture
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: GPUTarget("cuda", architecture, 32)
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (None, binary.decode(), 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": _launch.SHARED_LIMIT[architecture]},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, ptx: str, *rest: Any) -> None:
            values = rest[4:]  # behind packed metadata, launch metadata and two hooks
            typed = zip(source.signature.values(), values, strict=True)
            arguments = [(kind, value) for kind, value in typed if kind != "constexpr"]
            with _disable_current_modes():
                _CURRENT[-1].run(ptx, (x, y, z), metadata.shared, arguments)

        return launch


_CURRENT: list[Gpu] = []  # a compiled kernel keeps its launcher, which asks here for the device of the moment


def _without_ptxas(*asked: Any) -> Any:
    """Triton's hook on the compiler's stages; without arguments it asks for a name in the key of its cache."""
    if not asked:
        return "interpreted from its PTX", "interpreted from its PTX"
    stages = asked[1]
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


@contextlib.contextmanager
def device(architecture: int, **options: Any) -> Iterator[Gpu]:
    """Inside, the ops' Triton kernels take CPU tensors and run as compiled for `architecture`; options are Gpu's."""
    gpu = Gpu(architecture, **options)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ops_on(architecture, _Driver(gpu)))
        if gpu.multiprocessors is not None:
            stack.enter_context(mock.patch.dict(_launch.MULTIPROCESSORS, {architecture: gpu.multiprocessors}))
        hook = mock.patch.object(triton.knobs.runtime, "add_stages_inspection_hook", _without_ptxas)
        stack.enter_context(hook)
        stack.enter_context(gpu.written)
        _CURRENT.append(gpu)
        stack.callback(_CURRENT.pop)
        yield gpu


@contextlib.contextmanager
def ops_on(architecture: int, runtime: Any) -> Iterator[None]:
    """Inside, Triton compiles for this architecture and launches through `runtime`, a driver; the ops take CPU tensors
    for its own."""

    def available(device: torch.device, dtype: torch.dtype, dots: bool) -> str | None:
        return _launch.arch_reason(architecture, dots)

    with contextlib.ExitStack() as stack:
        for op in OPS:
            module = importlib.import_module(f"pcs_kernels.ops.{op}.triton_impl")
            if hasattr(module, "current_arch"):
                stack.enter_context(mock.patch.object(module, "current_arch", lambda _: architecture))
            if hasattr(module, "unavailable_for"):
                stack.enter_context(mock.patch.object(module, "unavailable_for", available))
        stack.enter_context(mock.patch.object(_launch, "unavailable_for", available))
        stack.enter_context(mock.patch.object(driver, "_active", runtime))
        forget_choices()  # of before, and afterwards of the time inside
        stack.callback(forget_choices)
        yield
