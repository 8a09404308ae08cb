"""What a test needs of the machine. Without a compiler there are no native kernels; with one, a build that failed
is a failure and hides nothing."""

import shutil

import pytest

from pcs_kernels import _native


def built() -> bool:
    try:
        _native.library()
    except ImportError:
        return False
    return True


COMPILER = shutil.which("c++") is not None
native = pytest.mark.skipif(not (COMPILER or built()), reason="no compiler, so no native kernels")
compiler = pytest.mark.skipif(not COMPILER, reason="no compiler")
CPU_BACKENDS = ("reference", pytest.param("native", marks=native))
