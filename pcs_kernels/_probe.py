"""The first launch on a card: one trivial kernel, so that what Triton lacks there is known before it is needed.

Triton builds its launcher with a C compiler when the first kernel is launched, and has ptxas assemble the kernel: on a
machine without the one or with an old driver every launch fails, though the package is there.
"""

from __future__ import annotations

import os
import shutil
import sysconfig

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ._fallback import Fault, first_line

WRITTEN = 12345
_found: dict[int, Fault | None] = {}


@triton.jit
def probe_kernel(out_ptr, value):
    tl.store(out_ptr, value)


def reason(index: int) -> Fault | None:
    """Why no kernel can be built and launched on CUDA device `index`, or None. Tried once a process."""
    if index not in _found:
        # a capture must see no launch of ours, and under a mode (fake tensors) there is no memory to write to
        if torch.cuda.is_current_stream_capturing() or _get_current_dispatch_mode() is not None:
            return None
        _found[index] = _tried(index)
    return _found[index]


def _tried(index: int) -> Fault | None:
    try:
        with torch.cuda.device(index):
            out = torch.zeros(1, dtype=torch.int32, device=f"cuda:{index}")
            probe_kernel[(1,)](out, WRITTEN)
            written = int(out.item())
    except torch.OutOfMemoryError:
        raise  # says nothing of Triton
    except Exception as error:
        return Fault(f"Triton cannot build and launch a kernel here ({first_line(error)}). Fix: {_fix(error)}")
    if written == WRITTEN:
        return None
    return Fault(f"a kernel of Triton's wrote {written} for {WRITTEN}. Fix: upgrade triton and the GPU's driver")


def _fix(error: Exception) -> str:
    """What mends a failed first launch: what is missing is looked for, since Triton's text seldom says it."""
    text = str(error)
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc", "cl")), None)
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # where Triton looks on Debian
    header = os.path.join(sysconfig.get_paths(scheme)["include"], "Python.h")
    if "ptxas" in text:
        fix = "pip install --force-reinstall triton (its ptxas is missing or does not run)"
    elif "unsupported toolchain" in text or "driver" in text.lower():
        fix = "upgrade the GPU's driver"
    elif compiler is None:
        fix = "install a C compiler (apt install gcc), or name one in CC"
    elif not os.path.exists(header):
        fix = "install Python's headers (apt install python3-dev)"
    else:
        fix = "see what the compiler or Triton printed above"
    return f"{fix}, or set PCS_BACKEND=reference"
