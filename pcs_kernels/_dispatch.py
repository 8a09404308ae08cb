"""Which implementation of an op runs, and why the others do not.

Every op has up to three implementations, each a module with the same functions: `reference` (pure torch),
`triton` and `native` (C++). CUDA tensors try triton, then reference; CPU tensors native, then reference; any
other device takes the reference, and so does an AMD GPU (torch calls it "cuda", see ROCM). `with backend("triton")` or
PCS_BACKEND=triton forces one; a forced implementation never falls back: it raises with its reason. "sdpa" and
"xformers" name self_attention's external backends and leave the other ops to choose for themselves. What happens where
a backend fails to load, build or launch stands in _fallback.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ._direct import caller
from ._fallback import BackendUnavailable as BackendUnavailable
from ._fallback import Fault, first_line, guarded, tell_of_fault

BACKENDS = ("reference", "triton", "native")
EXTERNAL = ("sdpa", "xformers")
# Why an AMD GPU runs the reference; None elsewhere.
ROCM = (
    f"the Triton kernels compile for AMD GPUs (ROCm {torch.version.hip}) but were never run on one; PCS_BACKEND=triton"
    " tries them"
    if torch.version.hip
    else None
)
ORDER = {"cuda": ("reference",) if ROCM else ("triton", "reference"), "cpu": ("native", "reference")}
DEVICES = ("cpu", "cuda", "mps", "xpu")  # where autocast may be on
NEEDS = {"triton": "the triton package is not installed. Fix: pip install triton"}

LIBRARY = torch.library.Library("pcs_kernels", "DEF")
OPS: dict[str, Op] = {}


class Cost(NamedTuple):
    """What `pcs_kernels.costs` knows of a registered op: both parts name arguments of its schema."""

    flops: Callable[..., int] | None  # of the arguments that it names, and of `result`
    packed: str | None  # the weight that the CPU kernel packs
    packed_bytes: Callable[[torch.Tensor], int]  # how many the copy takes; 0 where this CPU reads it as it lies
    run: Callable[..., Any]  # the implementation on every device


COSTS: dict[str, Cost] = {}

_forced: str = ""


class Op:
    """The implementations of one op, loaded when first asked for."""

    def __init__(self, name: str, package: str, order: dict[str, tuple[str, ...]] | None = None) -> None:
        self.name = name
        self.package = package
        self.order = order or ORDER
        self._modules: dict[str, ModuleType | str] = {}
        self._strict: dict[str, ModuleType] = {}  # of a backend that was forced: it raises where the other falls back
        OPS[name] = self

    def module(self, backend_name: str) -> ModuleType | str:
        """The implementation module, or one sentence why it cannot be loaded."""
        found = self._modules.get(backend_name)
        if found is None:
            found = self._load(backend_name)
            self._modules[backend_name] = found
        return found

    def _load(self, backend_name: str) -> ModuleType | str:
        if backend_name == "reference":
            return importlib.import_module(f"{self.package}.reference")
        try:
            module = importlib.import_module(f"{self.package}.{backend_name}_impl")
        except ModuleNotFoundError as error:
            if error.name == "triton":
                return NEEDS["triton"]
            return _not_loaded(backend_name, error)
        except Exception as error:  # an old or broken Triton raises anything: AttributeError, RuntimeError, OSError
            return _not_loaded(backend_name, error)
        if backend_name != "triton":
            return module
        instead = getattr(module, "INSTEAD", None) or importlib.import_module(f"{self.package}.reference")
        self._strict[backend_name] = guarded(self.name, module, instead, falls_back=False)
        return guarded(self.name, module, instead, falls_back=True)

    def why_not(self, backend_name: str, *args: Any) -> str | None:
        """None when `backend_name` can run this call, else the reason in one sentence."""
        module = self.module(backend_name)
        if isinstance(module, str):
            return module
        return None if backend_name == "reference" else module.reason(*args)

    def select(self, forced: str, device_type: str, *args: Any) -> ModuleType:
        """The module that runs this call. `args` are what the implementation's `reason` looks at."""
        reason: str | None = None
        for candidate in (forced,) if forced else self.order.get(device_type, ("reference",)):
            module = self.module(candidate)
            if isinstance(module, str):
                reason = module
            else:
                reason = None if candidate == "reference" else module.reason(*args)
                if reason is None:
                    return self._strict.get(candidate, module) if forced else module
            if isinstance(reason, Fault) and not forced:
                tell_of_fault(candidate, reason)
        if forced:
            raise BackendUnavailable(f"{self.name}: backend {forced!r} cannot run this call: {reason}")
        raise BackendUnavailable(f"{self.name}: no backend can run on device {device_type!r}: {reason}")


def _not_loaded(backend_name: str, error: Exception) -> str:
    """Why a backend could not be imported, in one sentence."""
    if backend_name == "native" and type(error) is ImportError and error.name is None:
        return str(error)  # the sentence of _native.library: nothing is broken, there is no build
    version = getattr(sys.modules.get("triton"), "__version__", "") if backend_name == "triton" else ""
    what = f"triton {version}".strip() if backend_name == "triton" else "the C++ build"
    fix = {
        "triton": "pip install --force-reinstall triton, in the version that torch asks for (pip show torch)",
        "native": "install again with pip install --force-reinstall --no-deps",
    }[backend_name]
    return Fault(f"{what} cannot be loaded ({first_line(error)}). Fix: {fix}, or set PCS_BACKEND=reference")


def _valid(name: str, source: str) -> str:
    if name not in BACKENDS + EXTERNAL:
        raise ValueError(f"{source} is {name!r}; choose one of {', '.join(BACKENDS + EXTERNAL)}")
    return name


if os.environ.get("PCS_BACKEND"):
    _forced = _valid(os.environ["PCS_BACKEND"], "the environment variable PCS_BACKEND")


def forced_backend() -> str:
    """The backend that `backend(...)` or PCS_BACKEND forces now, or "" for automatic choice."""
    return _forced if _forced in BACKENDS else ""


def forced_external() -> str:
    """The external backend of self_attention that is forced now, or ""."""
    return _forced if _forced in EXTERNAL else ""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend inside the `with`, for the whole process: autograd runs backwards on other threads.

    Args:
        name: "reference", "triton" or "native"; "sdpa" or "xformers" for self_attention alone.

    Raises:
        BackendUnavailable: from a call that the forced backend cannot run; the message is its reason.
    """
    global _forced
    before = _forced
    _forced = _valid(name, "backend")
    try:
        yield
    finally:
        _forced = before


def autocast_is_on() -> bool:
    """Whether torch's own products would be computed in another dtype than their inputs'."""
    return bool(torch._C._is_any_autocast_enabled())  # one look for all devices


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `run` so that it computes in its inputs' dtype: autocast would change torch's products, and no kernel."""

    @functools.wraps(run)
    def plain(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():  # one look for all devices
            return run(*args)
        for kind in DEVICES:
            if torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return plain(*args)
        return run(*args)

    return plain


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    packed: str | None = None,
    packed_bytes: Callable[[torch.Tensor], int] = lambda weight: weight.nbytes,
    choose: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register a torch.library op: its schema, its implementation on every device, its fake, and its costs.

    Args:
        schema: as torch.library takes it.
        run: computes the op from its arguments; with `choose`, from what that chose and the arguments.
        fake: the op on tensors without values.
        flops: as `Cost` has it.
        packed: as `Cost` has it.
        packed_bytes: as `Cost` has it.
        choose: checks the arguments and selects an implementation, by shapes, strides, dtypes, devices and numbers
            alone: it is not called for every call (see `_direct.py`). What reads values belongs into `run`.

    Returns:
        The op for calls from Python.
    """
    name = schema.split("(", 1)[0]
    whole = run if choose is None else _chosen_each_time(choose, run)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, without_autocast(whole), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pcs_kernels::{name}", fake, lib=LIBRARY)
    COSTS[name] = Cost(flops, packed, packed_bytes, whole)
    packet: Callable[..., Any] = getattr(torch.ops.pcs_kernels, name)
    return packet if choose is None else caller(packet, choose, run)


def _chosen_each_time(choose: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    def whole(*args: Any) -> Any:
        result = run(choose(*args), *args)
        return distinct(result) if isinstance(result, tuple) else result

    return whole


def distinct(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The outputs with every empty one made anew: unneeded gradients may be one tensor, and ops must not alias."""
    return tuple(x if x.numel() else x.new_empty(x.shape) for x in outputs)
