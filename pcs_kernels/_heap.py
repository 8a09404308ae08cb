"""Memory that a process holds after it was freed (glibc): blocks in pages of their own, and the heap trimmed.

malloc keeps freed blocks of up to 32 MB for itself, and a heap in which copies that stay lie between activations that
go keeps their room too: 0.8 to 1.5 GB in a training step of SD1.5's shapes with 3.4 GB of packed weights.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
SMALL = 128 << 10  # malloc's own first threshold: larger blocks get pages of their own
LARGEST = 32 << 20  # where malloc's threshold ends by itself, once a block of that size was freed

_entered = 0  # how many `with`s are open, in all threads: the thresholds are the process's
_lock = threading.Lock()


@functools.cache
def _libc() -> Any | None:
    """The C library where it is glibc and the user has set none of its limits; else None."""
    if os.name != "posix" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return None
    library = ctypes.CDLL(None)
    known = all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim"))
    return library if known else None


@contextmanager
def pages_of_their_own() -> Iterator[None]:
    """Blocks of over 128 KB that are allocated inside the `with` leave the process when they are freed."""
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def _enter(change: int) -> None:
    global _entered
    with _lock:
        _entered += change
        _set_threshold(SMALL if _entered else LARGEST)


def _set_threshold(size: int) -> None:
    libc = _libc()
    if libc is not None:  # setting one ends malloc's own moving of both, so both are set to where they would end
        libc.mallopt(_MMAP_THRESHOLD, size)
        libc.mallopt(_TRIM_THRESHOLD, 2 * LARGEST)


def trim_heap() -> None:
    """Give the pages of freed blocks back to the system; nothing where the C library is not glibc."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(ctypes.c_size_t(0))
