"""The package map and the native builds: the same C++ for each instruction set, one probe that picks at import."""

import os
import platform
import sys

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

OPS = "self_attention cross_attention geglu group_norm_silu adamw8bit lowrank_residual bindings".split()
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
SETS = {"baseline": []}
if X86:
    SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma", "-mprefer-vector-width=512"]


def native(name: str, flags: list[str]) -> Pybind11Extension:
    return Pybind11Extension(
        f"pcs_kernels._native_{name}",
        [f"csrc/{op}.cpp" for op in OPS],
        define_macros=[("PCS_ISA", f"pcs_{name}"), ("PCS_MODULE", f"_native_{name}")],
        extra_compile_args=FLAGS + flags,
        extra_link_args=["-pthread"],
        cxx_std=17,
        optional=True,  # without a compiler the package still installs and runs on the reference
        depends=[f"csrc/{header}.h" for header in ("vec", "gemm", "attention", "ops", "parallel", "tensor_view")],
    )


class BuildApart(build_ext):
    """Each extension's objects in a folder of its own: they share sources and differ in flags."""

    def build_extension(self, ext):
        temp = self.build_temp
        self.build_temp = os.path.join(temp, ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = temp


extensions = [native(name, flags) for name, flags in SETS.items()]
extensions.append(Pybind11Extension("pcs_kernels._cpuid", ["csrc/cpuid.cpp"], cxx_std=17, optional=True))
if sys.platform == "win32":
    extensions = []  # the vector types are GCC's and Clang's

with ParallelCompile("PCS_BUILD_JOBS", default=os.cpu_count() or 1):
    setup(
        packages=["pcs_kernels"] + [f"pcs_kernels.{op}" for op in sorted(os.listdir("pcs_kernels")) if os.path.exists(f"pcs_kernels/{op}/op.py")],
        ext_modules=extensions,
        cmdclass={"build_ext": BuildApart},
    )
