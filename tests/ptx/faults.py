"""What the interpreter refuses: one class a check, so that a test can name the check that must fire."""

from __future__ import annotations


class Fault(Exception):
    """A kernel did what no kernel may do; the message names the instruction, its line of Python and the thread."""


class UnknownInstruction(Fault):
    """PTX that this interpreter has no meaning for: never skipped, never guessed."""


class OutOfBounds(Fault):
    """An address outside every allocation, or outside the shared memory that the kernel asked for."""


class Misaligned(Fault):
    """An address that is no multiple of the access's width."""


class Uninitialised(Fault):
    """A read of memory that nothing has written."""


class InFlight(Fault):
    """Shared memory touched while an asynchronous copy into it is not waited for."""


class Race(Fault):
    """Two warps, or two programs, touch the same memory without a barrier between them and one of them writes."""


class Divergence(Fault):
    """An instruction of a whole warp or block, executed by a part of it."""
