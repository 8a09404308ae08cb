"""The package map and the native builds: the same C++ for each instruction set, one probe that picks at import."""

import os
import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

OPS = ["self_attention", "cross_attention", "geglu", "group_norm_silu", "adamw8bit", "lowrank_residual"]
OPS += ["int8_weight", "frozen_product", "weight_gradient", "bindings"]
HEADERS = [str(header) for header in Path("csrc").glob("*.h")]
# gcc 12 takes the undefined operands inside its own AVX-512 headers for mistakes of ours.
FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
SETS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    SETS["avx2"] = "-mavx2 -mfma -mf16c"
    SETS["avx512f"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    SETS["avx512"] = SETS["avx512f"] + " -mavx512bf16"
    SETS["amx"] = SETS["avx512"] + " -mamx-tile -mamx-bf16"


def native(name: str, flags: str) -> Pybind11Extension:
    return Pybind11Extension(
        f"pcs_kernels._native_{name}",
        [f"csrc/{op}.cpp" for op in OPS],
        define_macros=[("PCS_ISA", f"pcs_{name}"), ("PCS_MODULE", f"_native_{name}")],
        extra_compile_args=FLAGS + flags.split(),
        extra_link_args=["-pthread"],
        cxx_std=17,
        depends=HEADERS,
        optional=True,  # without a compiler the package still installs and runs on the reference
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
    extensions = []  # the vector types are those of GCC and Clang

TINY = ["weights/**/*", "judge_weights/**/*", "*.json", "make/*.md", "contact_sheet.png"]  # the embedded model's files

kernels = find_namespace_packages(include=["pcs_kernels", "pcs_kernels.*"])
trainer = find_namespace_packages("python", include=["pcs_trainer", "pcs_trainer.*"])

with ParallelCompile("PCS_BUILD_JOBS", default=os.cpu_count() or 1):
    setup(
        packages=kernels + trainer,
        package_dir={"pcs_kernels": "pcs_kernels", "pcs_trainer": "python/pcs_trainer"},
        package_data={
            "pcs_kernels": ["py.typed", "README.md"],
            "pcs_trainer": ["py.typed", "*.pyi", "report/*.html", *[f"tiny/{files}" for files in TINY]],
        },
        ext_modules=extensions,
        cmdclass={"build_ext": BuildApart},
    )
