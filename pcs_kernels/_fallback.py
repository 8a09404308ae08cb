"""What happens where a backend fails: the next one does the work, one warning says so, and nothing is tried twice.

A backend can fail as it is loaded (a broken installation), at its first launch (no C compiler), or in the launch of one
kernel for one shape (more shared memory than the card has). The first two are reasons of the backend; the third is
caught around the call, done again from its start by plain torch, and remembered for calls of the same kind.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any

from torch import Tensor


class BackendUnavailable(RuntimeError):
    """A forced backend cannot do this call; the message is its reason."""


class Fault(str):
    """A reason that tells of a failure on this machine, not of a limit of the backend: its fallback is told, once."""

    __slots__ = ()


# Errors that a kernel's build or launch raises before anything has run. An illegal access, found later, is not one of
# them: the memory is lost then, and a fallback would hide it.
BUILD_ERRORS = frozenset({"CompilationError", "PTXASError", "CompileTimeAssertionFailure"})
BUILD_MESSAGES = (
    "no kernel image is available",
    "device kernel image is invalid",
    "unsupported toolchain",
    "PassManager::run failed",
    "`ptxas` failed",
    "`ptxas` raised",
    "Cannot find ptxas",
    "Failed to find C compiler",
)
_told: set[Hashable] = set()


def tell_once(key: Hashable, message: str) -> None:
    """Warn, once a process for each key."""
    if key not in _told:
        _told.add(key)
        warnings.warn(f"pcs_kernels: {message}", RuntimeWarning, stacklevel=2)


def tell_of_fault(backend_name: str, fault: Fault) -> None:
    """Warn, once a process and backend, that another backend does its work."""
    tell_once(backend_name, f"the {backend_name} backend fails on this machine and plain torch runs instead: {fault}")


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its text that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def launch_reason(error: Exception) -> str | None:
    """Why a kernel could not be built or launched, or None for an error that says something else."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfResources" in names:  # by name, so that this file needs no Triton
        needed, allowed = getattr(error, "required", "more"), getattr(error, "limit", "less")
        return f"it needs {needed} of {getattr(error, 'name', 'a resource')} and the card allows {allowed}"
    if names & BUILD_ERRORS or any(text in str(error) for text in BUILD_MESSAGES):
        return f"Triton could not build it ({first_line(error)})"
    return None


def _kind(argument: Any) -> Any:
    """What of an argument decides which kernel is launched; not a number: adamw8bit's step is another each time."""
    if isinstance(argument, Tensor):
        return argument.dtype, tuple(argument.shape), argument.stride(), argument.device.index
    return argument if isinstance(argument, (bool, tuple)) else type(argument)


def _described(arguments: tuple[Any, ...]) -> str:
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    return ", ".join(f"{str(t.dtype)[6:]} {list(t.shape)}" for t in tensors)


def _caught(op: str, name: str, run: Callable[..., Any], instead: Callable[..., Any] | None) -> Callable[..., Any]:
    """`run`, or `instead` for calls whose kernel cannot be built or launched; BackendUnavailable where that is None."""
    failed: set[Hashable] = set()

    @functools.wraps(run)
    def call(*arguments: Any) -> Any:
        if failed and instead is not None and tuple(map(_kind, arguments)) in failed:
            return instead(*arguments)
        try:
            return run(*arguments)
        except Exception as error:
            reason = launch_reason(error)
            if reason is None:
                raise
            what = f"{op} ({name}) of {_described(arguments)} cannot run its Triton kernel: {reason}"
            if instead is None:
                raise BackendUnavailable(f"{what}. Fix: do not force the backend for this call") from error
        kind = tuple(map(_kind, arguments))
        failed.add(kind)
        tell_once((op, name, kind), f"{what}; plain torch does such calls from now on")
        return instead(*arguments)

    return call


def guarded(op: str, module: ModuleType, instead: ModuleType, falls_back: bool) -> ModuleType:
    """A copy of a Triton implementation whose calls survive a kernel that cannot be built or launched.

    Plain torch does the whole call again. That is right also where a call writes in place (adamw8bit): it launches
    one kernel, and a launch that failed has written nothing; tests/test_fallback.py holds those calls to one launch.

    Args:
        op: its name, for the messages.
        module: of the Triton implementation.
        instead: the op in plain torch; the functions that both have are the op's calls.
        falls_back: False for a forced backend, whose failure is raised as BackendUnavailable.
    """
    copy = ModuleType(module.__name__, module.__doc__)
    copy.__dict__.update(vars(module))
    for name, function in inspect.getmembers(instead, inspect.isfunction):
        run = getattr(module, name, None)
        if function.__module__ == instead.__name__ and not name.startswith("_") and run is not None:
            setattr(copy, name, _caught(op, name, run, function if falls_back else None))
    return copy
