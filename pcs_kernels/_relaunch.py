"""A Triton kernel launched again as it was before, past the JIT's own binding of arguments.

For each launch Triton's JIT binds the arguments by name, asks of every one how it specializes the kernel, spells that
out as text and looks up the compiled kernel under it. The answer is the same whenever the same kernel gets tensors of
the same dtypes and alignment and the same numbers, as in every step of a training. So what the JIT's own launch came to
is kept under these, and the next time its launcher is called at once, on the current device and stream. Whatever is
not as the launchers of Triton 3.4 to 3.8 are goes the ordinary way each time: the interpreter, AMD's backend (whose
kernels depend on the tensors' sizes too), hooks around launches, a kernel that is still being compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.driver import driver

LAUNCHES = 8192  # remembered; beyond them all are forgotten: a network has a few hundred
ORDINARY = bool(triton.knobs.runtime.interpret) or torch.version.hip is not None
VALUES = frozenset((int, bool, NoneType))
_runtime = triton.knobs.runtime


class Ready(NamedTuple):
    """A compiled kernel on its device."""

    run: Callable[..., Any]  # Triton's launcher
    function: Any
    metadata: Any
    constants: tuple[Any, ...]  # the values of the constexprs, which follow the arguments
    kernel: Any  # kept so that no other takes its place in memory, and in the key


_ready: dict[tuple[Any, ...], Ready] = {}
_made_with: tuple[Any, Any] = (None, None)  # the driver and the hook on the compiler's stages of what is ready


def run(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    num_warps: int,
    num_stages: int,
    constexprs: dict[str, Any],
) -> None:
    """Run a kernel on the current device; the arguments are `launch`'s."""
    global _made_with
    if ORDINARY or _hooked(_runtime.launch_enter_hook) or _hooked(_runtime.launch_exit_hook):
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constexprs)
        return
    active = driver.active
    if _made_with[0] is not active or _made_with[1] is not _runtime.add_stages_inspection_hook:
        _ready.clear()
        _made_with = active, _runtime.add_stages_inspection_hook
    device = active.get_current_device()
    # of an integer its value stands for how it specializes the kernel; a float does not
    kinds = [a if type(a) in VALUES else float if type(a) is float else (a.dtype, a.data_ptr() & 15 == 0) for a in args]
    key = (id(kernel), device, num_warps, num_stages, *constexprs.values(), *kinds)
    ready = _ready.get(key)
    if ready is None:
        compiled = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constexprs)
        _keep(key, kernel, compiled, len(args), constexprs)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    ready.run(x, y, z, stream, ready.function, ready.metadata, None, None, None, *args, *ready.constants)


def _hooked(hook: Any) -> bool:
    """Whether a hook of Triton's would be called: None, or since Triton 3.5 a chain that may be empty."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _keep(key: tuple[Any, ...], kernel: Any, compiled: Any, given: int, constexprs: dict[str, Any]) -> None:
    """Remember a launch, where kernel and launcher are as they are known here."""
    names = kernel.arg_names[given:]
    known = isinstance(compiled, triton.compiler.CompiledKernel) and compiled.function is not None
    if not known or kernel.pre_run_hooks or set(names) != set(constexprs):
        return
    if len(_ready) >= LAUNCHES:
        _ready.clear()
    constants = tuple(constexprs[name] for name in names)
    _ready[key] = Ready(compiled.run, compiled.function, compiled.packed_metadata, constants, kernel)
