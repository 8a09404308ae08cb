"""Which backend runs, why not the others, and how light the import is."""

import importlib.util
import os
import platform
import subprocess
import sys

import pytest
import torch

import pcs_kernels
from pcs_kernels import _native, _packed
from tests import needs


def python(code: str, **environment: str) -> str:
    """The last line that `code` prints in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip().splitlines()[-1]


@needs.native
def test_a_forced_backend_never_falls_back():
    x = torch.randn(2, 8, dtype=torch.float16)
    with pcs_kernels.backend("native"), pytest.raises(pcs_kernels.BackendUnavailable, match=r"geglu.*float16"):
        pcs_kernels.geglu(x)
    with pcs_kernels.backend("triton"), pytest.raises(pcs_kernels.BackendUnavailable, match="CUDA"):
        pcs_kernels.geglu(x)
    with pytest.raises(ValueError, match="reference, triton, native"), pcs_kernels.backend("cuda"):
        pass


def test_backend_is_restored_after_an_error():
    with pytest.raises(RuntimeError), pcs_kernels.backend("reference"):
        raise RuntimeError
    assert pcs_kernels._dispatch.forced_backend() == ""


@pytest.mark.slow
def test_environment_forces_a_backend():
    code = "import pcs_kernels; print(pcs_kernels._dispatch.forced_backend())"
    assert python(code, PCS_BACKEND="reference") == "reference"
    bad = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PCS_BACKEND": "gpu"}
    )
    assert "PCS_BACKEND is 'gpu'" in bad.stderr


def test_import_is_light():
    code = (
        "import sys, time, torch; start = time.perf_counter(); import pcs_kernels; cost = time.perf_counter() - start;"
        "heavy = 'triton', 'diffusers', 'transformers', 'xformers', 'torch._dynamo';"
        "print(cost, [m for m in heavy if m in sys.modules])"
    )
    cost, loaded = python(code).split(" ", 1)
    assert loaded == "[]"
    assert float(cost) < 0.2


@pytest.mark.slow
def test_the_package_runs_without_a_compiler():
    """With the compiled modules hidden, everything runs on the reference and says why."""
    code = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("pcs_kernels._native_", "pcs_kernels._cpuid")):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide())
import torch, pcs_kernels
from pcs_kernels import diagnostics
x = torch.randn(2, 8, 4, 4, requires_grad=True)
pcs_kernels.group_norm_silu(x, 4).sum().backward()
q = torch.randn(1, 2, 8, 8)
pcs_kernels.self_attention(q, q, q); pcs_kernels.cross_attention(q, q, q)
p = torch.nn.Parameter(torch.randn(5000)); p.grad = torch.randn(5000)
pcs_kernels.optim.AdamW8bit([p]).step()
print({verdict.text for verdict in diagnostics.verdicts() if verdict.backend == "native"})
"""
    said = python(code)
    assert "not built" in said and "install g++" in said


@pytest.mark.slow
def test_main_lists_every_op_and_backend():
    ran = subprocess.run([sys.executable, "-m", "pcs_kernels"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    for op in pcs_kernels._dispatch.OPS:
        for backend in pcs_kernels._dispatch.BACKENDS:
            lines = [line for line in ran.stdout.splitlines() if line.split()[:2] == [op, backend]]
            assert len(lines) == 1 and len(lines[0].split()) > 2, (op, backend)


def test_external_backends_of_self_attention():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    with pcs_kernels.backend("sdpa"):
        assert torch.equal(pcs_kernels.self_attention(q, k, v), expected)
        pcs_kernels.geglu(torch.randn(2, 8))  # the other ops choose for themselves
    with pcs_kernels.backend("xformers"), pytest.raises(RuntimeError, match="xformers needs a CUDA tensor"):
        pcs_kernels.self_attention(q, k, v)


def test_packed_weights_follow_the_weight():
    x = torch.randn(2, 16)
    weight = torch.randn(8, 16)

    def linear():
        return pcs_kernels.frozen_linear(x, weight)

    torch.testing.assert_close(linear(), x @ weight.t())
    weight.mul_(2)
    torch.testing.assert_close(linear(), x @ weight.t())
    weight.data.mul_(2)
    _packed.forget_packed_weights()
    torch.testing.assert_close(linear(), x @ weight.t())
    with torch.inference_mode():
        weight = torch.randn(8, 16)
        torch.testing.assert_close(linear(), x @ weight.t())


def test_packed_weights_die_with_the_weight():
    _packed.forget_packed_weights()
    weight = torch.randn(8, 16)
    pcs_kernels.frozen_linear(torch.randn(2, 16), weight)
    assert len(_packed._cache) == 1
    del weight
    assert len(_packed._cache) == 0


def test_packed_weights_of_many_shapes_do_not_pile_up():
    _packed.forget_packed_weights()
    weight = torch.randn(8, 16)
    for rows in range(1, 9):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(pcs_kernels.frozen_linear(x, weight), x @ weight.t())
    ((_, _, kinds),) = _packed._cache.values()
    assert [len(variants) for variants in kinds.values()] == [_packed.MOST_VARIANTS]


def test_unpacked_keeps_nothing():
    _packed.forget_packed_weights()
    pcs_kernels.frozen_conv2d(torch.randn(1, 4, 5, 5), torch.randn(8, 4, 3, 3), pack=False)
    assert not _packed._cache


def builds() -> tuple[str, ...]:
    """The builds that this CPU runs, the best last."""
    return _native.SETS[: _native.SETS.index(_native.instruction_set()) + 1] if needs.built() else _native.SETS


@pytest.mark.slow
@needs.native
@pytest.mark.parametrize("build", builds())
def test_every_build_is_no_worse_than_torch(build):
    """The whole file of values on another instruction set, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_op_values.py", "-k", "native"]
    if build == builds()[-1]:
        pytest.skip("this build runs the whole suite already")
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PCS_NATIVE": build}, timeout=900)
    assert ran.returncode == 0, ran.stdout[-3000:]


@needs.compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64") or sys.platform == "win32", reason="one build here")
@pytest.mark.parametrize("build, flags", [
    ("baseline", []), ("avx2", ["-mavx2"]), ("avx512f", ["-mavx512f"]),
    ("avx512", ["-mavx512bf16"]), ("amx", ["-mamx-tile", "-mamx-bf16"]),
])  # fmt: skip
def test_every_build_that_the_compiler_can_make_is_there(build, flags, tmp_path):
    """A build is optional at set-up, so that an old compiler does not stop it: a mistake in one would pass unseen."""
    (tmp_path / "empty.cpp").write_text("")
    command = [needs.COMPILER, *flags, "-c", "empty.cpp", "-o", "empty.o"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip(f"the compiler does not know {flags}")
    assert importlib.util.find_spec(f"pcs_kernels._native_{build}"), f"the {build} build failed; see pip install -v"


@pytest.mark.slow
@needs.native
def test_a_build_beyond_the_cpu_is_refused():
    code = "import pcs_kernels._native as n\ntry: n.instruction_set()\nexcept ImportError as e: print(e)"
    assert "choose one of" in python(code, PCS_NATIVE="avx1024")


def test_the_version_of_a_weight_changes_with_each_replacement_and_each_write():
    weight = torch.nn.Parameter(torch.randn(4, 4))
    seen = [pcs_kernels.weight_version(weight)]
    assert pcs_kernels.weight_version(weight) == seen[0] == pcs_kernels.weight_version(weight.detach().view(16))
    with torch.no_grad():
        weight.mul_(2)
    seen.append(pcs_kernels.weight_version(weight))
    before, weight.data = weight.data, torch.randn(4, 4)  # kept alive, so that its storage's place is not taken again
    seen.append(pcs_kernels.weight_version(weight))
    assert len(set(seen)) == 3 and before.numel()
