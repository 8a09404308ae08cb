"""A Triton kernel launched again as it was before, past the JIT's own binding of arguments.

For each launch Triton's JIT binds the arguments by name, asks of every one how it specializes the kernel, spells that
out as text and looks up the compiled kernel under it. The answer is the same whenever the same kernel gets tensors of
the same dtypes and alignment and the same numbers, as in every step of a training. So what the JIT's own launch came to
is kept under these, and the next time its launcher is called at once, on the current device and stream. Whatever is
not as the launchers of Triton 3.4 to 3.8 are goes the ordinary way each time: the interpreter, AMD's backend (whose
kernels depend on the tensors' sizes too), hooks around launches, a kernel that is still being compiled.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import NoneType
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.driver import driver

LAUNCHES = 8192  # remembered; beyond them all are forgotten: a network has a few hundred
KNOBS: Any = getattr(getattr(triton, "knobs", None), "runtime", None)  # since Triton 3.4
ORDINARY = KNOBS is None or bool(KNOBS.interpret) or torch.version.hip is not None
VALUES = frozenset((int, bool, NoneType))


class Ready(NamedTuple):
    """A compiled kernel on its device."""

    run: Callable[..., Any]  # Triton's launcher
    function: Any
    metadata: Any
    constants: tuple[Any, ...]  # the values of the constexprs, which follow the arguments
    kernel: Any  # kept so that no other takes its place in memory, and in the key


class Written(NamedTuple):
    """A launch as `written_down` collects it."""

    ready: Ready
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    device: int
    made_with: tuple[Any, Any]


_ready: dict[tuple[Any, ...], Ready] = {}
_made_with: tuple[Any, Any] = (None, None)  # the driver and the hook on the compiler's stages of what is ready
_writing: dict[int, list[Any]] = {}  # thread -> the launches that `written_down` collects


def _driver() -> Any:
    """Triton's driver, where what is ready may be launched now; None where every launch must go the ordinary way."""
    global _made_with
    if ORDINARY or _hooked(KNOBS.launch_enter_hook) or _hooked(KNOBS.launch_exit_hook):
        return None
    active, hook = driver.active, KNOBS.add_stages_inspection_hook
    if _made_with[0] is not active or _made_with[1] is not hook:
        _ready.clear()
        _made_with = active, hook
    return active


def _hooked(hook: Any) -> bool:
    """Whether a hook of Triton's would be called: None, or since Triton 3.5 a chain that may be empty."""
    return hook is not None and bool(getattr(hook, "calls", True))


def run(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    num_warps: int,
    num_stages: int,
    constexprs: dict[str, Any],
) -> None:
    """Run a kernel on the current device; the arguments are `launch`'s."""
    active = _driver()
    if active is None:
        ready, device = None, -1
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constexprs)
    else:
        device = active.get_current_device()
        # of an integer its value stands for how it specializes the kernel; a float does not
        kinds = [
            a if type(a) in VALUES else float if type(a) is float else (a.dtype, a.data_ptr() & 15 == 0) for a in args
        ]
        key = (id(kernel), device, num_warps, num_stages, *constexprs.values(), *kinds)
        ready = _ready.get(key)
        if ready is None:
            compiled = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constexprs)
            ready = _keep(key, kernel, compiled, len(args), constexprs)
        else:
            stream = active.get_current_stream(device)
            constants = ready.constants
            ready.run(*_padded(grid), stream, ready.function, ready.metadata, None, None, None, *args, *constants)
    if _writing:
        launches = _writing.get(threading.get_ident())
        if launches is not None:
            launches.append(ready and Written(ready, _padded(grid), args, device, _made_with))


def _padded(grid: tuple[int, ...]) -> tuple[int, ...]:
    return (*grid, 1, 1)[:3]


def _keep(key: tuple[Any, ...], kernel: Any, compiled: Any, given: int, constexprs: dict[str, Any]) -> Ready | None:
    """Remember a launch, where kernel and launcher are as they are known here."""
    names = kernel.arg_names[given:]
    known = isinstance(compiled, triton.compiler.CompiledKernel) and compiled.function is not None
    if not known or kernel.pre_run_hooks or set(names) != set(constexprs):
        return None
    if len(_ready) >= LAUNCHES:
        _ready.clear()
    constants = tuple(constexprs[name] for name in names)
    ready = Ready(compiled.run, compiled.function, compiled.packed_metadata, constants, kernel)
    _ready[key] = ready
    return ready


@contextlib.contextmanager
def written_down() -> Iterator[list[Any]]:
    """Inside, this thread's launches are also collected: as `Written`, or None for one that is not kept."""
    thread = threading.get_ident()
    launches: list[Any] = []
    _writing[thread] = launches
    try:
        yield launches
    finally:
        del _writing[thread]


def stream_of(made_with: tuple[Any, Any], device: int) -> tuple[Any] | None:
    """The stream for launches that were written down; None where another driver or device is at work now."""
    active = _driver()
    if active is None or made_with is not _made_with or active.get_current_device() != device:
        return None
    return (active.get_current_stream(device),)
