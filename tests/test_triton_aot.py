"""Every Triton kernel compiled ahead of time for every GPU generation, without a GPU.

No spill in the shipped launch tables, shared memory within each card's limit, registers within triton_budget.json
(`python tests/triton_budget.py` rewrites it).
"""

from __future__ import annotations

import json

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed here; there are no kernels to compile")

from pcs_kernels import _launch  # noqa: E402
from pcs_kernels.ops.cross_attention import triton_impl as cross  # noqa: E402
from pcs_kernels.ops.frozen_conv import triton_impl as conv  # noqa: E402
from pcs_kernels.ops.geglu import triton_impl as geglu  # noqa: E402
from pcs_kernels.ops.lowrank_residual import triton_impl as lowrank  # noqa: E402
from pcs_kernels.ops.self_attention import triton_impl as attention  # noqa: E402
from tests import triton_budget  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_launch.INTERPRETED, reason="TRITON_INTERPRET=1: interpreted kernels do not compile"),
]


@pytest.fixture(scope="module")
def everything() -> dict[tuple[str, str, int], dict[str, int]]:
    """(op, kernel and shape, arch) -> registers, spill, shared; NVIDIA's and AMD's, compiled in one go."""
    jobs = triton_budget.all_jobs() + [job for arch in triton_budget.AMD_ARCHS for job in triton_budget.amd_jobs(arch)]
    results = triton_budget.measure(jobs)
    names = [(op, triton_budget.labels_of(op, arch)[index], arch) for op, arch, index in jobs]
    return dict(zip(names, results, strict=True))


@pytest.fixture(scope="module")
def compiled(everything) -> dict[tuple[str, str, int], dict[str, int]]:
    """NVIDIA's."""
    return {key: found for key, found in everything.items() if key[2] not in triton_budget.AMD_ARCHS}


@pytest.fixture(scope="module")
def budget() -> dict:
    return json.loads(triton_budget.BUDGET.read_text())


def test_every_op_has_cases_on_every_architecture():
    for op in triton_budget.OPS:
        for arch in _launch.AOT_ARCHS:
            assert triton_budget.cases_of(op, arch), f"{op} compiles nothing for sm_{arch}"


def test_shared_memory_fits_every_card(compiled):
    over = {k: v["shared"] for k, v in compiled.items() if v["shared"] > _launch.SHARED_LIMIT[k[2]]}
    assert not over, f"more shared memory than the card has: {over}"


def test_nothing_spills(compiled):
    spilled = {k: v["spill"] for k, v in compiled.items() if k[0] in triton_budget.OPS and v["spill"]}
    assert not spilled, f"bytes of spilled registers a thread: {spilled}"


def test_products_compile_to_matrix_instructions(compiled):
    """On every architecture: `tl.dot` on plain arithmetic would be right, and many times slower."""
    products = triton_budget.PRODUCTS
    kernels = {k: v["matrix"] for k, v in compiled.items() if k[0] in products and not k[1].startswith("sum_partials")}
    plain = sorted(k for k, matrix in kernels.items() if not matrix)
    assert kernels and not plain, f"without matrix instructions: {plain}"


def test_budget_lists_exactly_the_compiled_kernels(compiled, budget):
    listed = {
        (op, name, int(arch[3:]))
        for op, kernels in budget["ops"].items()
        for name, archs in kernels.items()
        for arch in archs
        if int(arch[3:]) in triton_budget.architectures()
    }
    wanted = {key for key in compiled if key[0] in triton_budget.OPS}
    assert listed == wanted, f"run python tests/triton_budget.py: {sorted(listed ^ wanted)[:8]} differ"


def test_registers_and_shared_memory_stay_within_the_budget(compiled, budget):
    if budget["triton"] != triton.__version__:
        pytest.skip(f"the budget was measured with triton {budget['triton']}, this is {triton.__version__}")
    grown = []
    for (op, name, arch), found in compiled.items():
        if op in triton_budget.OPS:
            registers, _, shared = budget["ops"][op][name][f"sm_{arch}"]
            if found["registers"] > registers or found["shared"] > shared:
                grown.append(f"{op} {name} sm_{arch}: {found}, budget {registers} registers, {shared} shared bytes")
    assert not grown, "above the budget:\n" + "\n".join(grown)


@pytest.mark.parametrize("arch", triton_budget.AMD_ARCHS, ids=_launch.arch_name)
def test_kernels_compile_for_amd_within_their_local_memory(everything, arch):
    """One launch of each kernel, or all with PCS_EVERY_CASE: compiled only, for who asks for them there."""
    here = {(op, name): found for (op, name, where), found in everything.items() if where == arch}
    assert len(here) == len(triton_budget.amd_jobs(arch)) > 0
    products = {op for op, _ in here} & set(triton_budget.PRODUCTS)
    assert bool(products) == (_launch.arch_reason(arch, dots=True) is None)
    for (op, name), found in here.items():
        assert found["shared"] <= _launch.SHARED_LIMIT[arch], f"{name}: {found}"
        if op in products and not name.startswith("sum_partials"):
            assert found["matrix"], f"{name} has no matrix instructions"


def test_turing_is_unsupported_for_products_and_says_why():
    q, x, w = _launch.meta(1, 2, 16, 64), _launch.meta(1, 16, 64), _launch.meta(64, 64)
    reasons = {}
    with _launch.recording(75):
        reasons["cross_attention"] = cross.reason(q, q, q, None, 1.0)
        reasons["self_attention"] = attention.reason(q, q, q, 1.0)
        reasons["lowrank_residual"] = lowrank.reason(x, w, None, w, w, None, 1.0, None)
        reasons["frozen_conv"] = conv.reason(x, w)
        assert geglu.reason(x) is None
    for op, reason in reasons.items():
        assert reason is not None and "sm_75 is unsupported" in reason and "tensor-core" in reason, f"{op}: {reason}"
        assert reason.endswith("use the reference")


@pytest.mark.parametrize("multiprocessors, tile", ((28, (128, 128)), (84, (128, 128)), (128, (128, 64))))
def test_a_product_takes_the_tile_that_leaves_fewest_multiprocessors_waiting(multiprocessors, tile):
    """[4096, 640] is 160 tiles of 128 x 128: two rounds of 128 multiprocessors, the second of 32."""
    assert lowrank.product_tile(1, 4096, 640, multiprocessors)[:2] == tile


def test_features_are_split_only_where_rows_leave_multiprocessors_idle():
    assert lowrank.split_features(1280, 32, 128, 128) == (1, 1280)
    assert lowrank.split_features(1280, 32, 8, 128) == (14, 96)
    assert lowrank.split_features(40, 32, 1, 128) == (1, 64), "two steps at least"


def test_reasons_on_the_cpu_name_the_mend():
    assert "set TRITON_INTERPRET=1" in geglu.reason(torch.zeros(2, 4))


def test_neighbouring_architectures_take_the_tabled_limits():
    assert [_launch.known_arch(c) for c in (75, 87, 89, 90, 103, 121)] == [75, 86, 89, 90, 100, 120]
