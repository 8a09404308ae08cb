"""The version of this package, read without importing torch."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "pcs_kernels"  # one distribution holds the kernels and the trainer
NOT_INSTALLED = f"(version unknown: {DISTRIBUTION} is not installed. Fix: pip install -e . in the source tree)"


def own_version() -> str:
    """The installed version; a sentence in brackets where the package runs from a source tree that is not installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return NOT_INSTALLED
