"""What can go wrong, by name. Every message is one sentence that names the thing and the fix."""

from __future__ import annotations

from typing import Any


class PcsError(Exception):
    """The parent of every error that this package raises on purpose, beside ValueError for a bad argument."""


class UnsupportedModel(PcsError, ValueError):
    """A configuration or a file that this package cannot take; the message names the value and the fix."""


class NotTrained(PcsError, RuntimeError):
    """A proof failed: the message names the tensor."""


class TrainingStopped(PcsError, RuntimeError):
    """The run could not go on; `concept` holds the last good state, where there was one."""

    def __init__(self, sentence: str, concept: Any = None) -> None:
        super().__init__(sentence)
        self.concept = concept  # a Concept or None; errors stand below every room and cannot import the type


class NotSaved(PcsError, OSError):
    """What was learned could not be written; `concept` holds it, and the message says what is kept on disk."""

    def __init__(self, sentence: str, concept: Any) -> None:
        super().__init__(sentence)
        self.concept = concept


class UsageError(PcsError):
    """A wrong flag, value or combination on the command line; exit code 2."""


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device or of the machine did not suffice; torch's CPU allocator has no class for it."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


class DoesNotFit(PcsError):
    """What was asked for does not fit the memory budget; exit code 3."""
