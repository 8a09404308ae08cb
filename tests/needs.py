"""What a test needs of the machine. Without a compiler there are no native kernels; with one, a build that failed
is a failure (test_dispatch asks for each), and so is one that PCS_NATIVE names and that is not there."""

import os
import shutil

import pytest

from pcs_kernels import _native


def built() -> bool:
    try:
        _native.library()
    except ImportError:
        return False
    return True


COMPILER = next(filter(shutil.which, (os.environ.get("CXX", "c++").split()[0], "c++", "g++", "clang++")), None)
native = pytest.mark.skipif(
    not (COMPILER or os.environ.get("PCS_NATIVE") or built()), reason="no compiler, so no native kernels"
)
compiler = pytest.mark.skipif(COMPILER is None, reason="no compiler")
CPU_BACKENDS = ("reference", pytest.param("native", marks=native))
