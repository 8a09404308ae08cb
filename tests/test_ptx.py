"""Every op's compiled kernels, executed from their PTX without a GPU (tests/ptx), and that broken ones are caught."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed here; there are no kernels to compile")

import pcs_kernels  # noqa: E402
from pcs_kernels import _launch  # noqa: E402
from pcs_kernels.optim import AdamW8bit, adamw8bit, together  # noqa: E402

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: interpreted kernels do not compile", allow_module_level=True)

from pcs_kernels._operands import sum_partials  # noqa: E402
from tests import op_cases  # noqa: E402
from tests.every_case import EVERY_CASE  # noqa: E402
from tests.ptx import mutants, report  # noqa: E402
from tests.ptx.cases import DTYPES, every_check, of_case, ordinary_checks  # noqa: E402
from tests.ptx.counting import counted  # noqa: E402
from tests.ptx.faults import UnknownInstruction  # noqa: E402
from tests.ptx.launcher import device  # noqa: E402
from tests.ptx.parse import parse  # noqa: E402
from tests.ptx.step import Step  # noqa: E402
from tests.triton_budget import OPS  # noqa: E402

ARCHITECTURE = 86
NEWER = (
    ("lowrank 63x320->320 r16 masked", 90, "wgmma.mma_async"),
    ("self_attention (1, 2, 300, 77, 80)", 90, "wgmma.mma_async"),
    ("group_norm 64/32 contiguous silu in pieces", 120, "fma.rn.f32x2"),
    ("group_norm 8/8 strided None", 120, "fma.rn.f32.bf16"),
    ("cross_attention (2, 2, 63, 77, 40) with maps", 120, "stmatrix"),
)
PRODUCTS = ("cross_attention", "self_attention", "lowrank_residual", "frozen_conv")
ROOT = Path(__file__).resolve().parents[1]
# float16 by default where it is cheap: an op of each kind. Its kernels differ from bfloat16's in the instructions'
# types alone; PCS_EVERY_CASE=1 runs them all.
HALF = [check for check in ordinary_checks() if check.name.startswith(("geglu", "group_norm 64/32", "linear", "conv"))]
ORDINARY = [("bf16", check) for check in ordinary_checks()]
ORDINARY += [("fp16", check) for check in (ordinary_checks() if EVERY_CASE else HALF)]


@pytest.fixture(scope="module", autouse=True)
def compiled_anew(tmp_path_factory):
    """No kernel of an earlier run: what is executed was compiled from this source by this Triton."""
    before, triton.knobs.cache.dir = triton.knobs.cache.dir, str(tmp_path_factory.mktemp("triton"))
    yield
    triton.knobs.cache.dir = before


@pytest.fixture(scope="module")
def ran() -> dict[tuple[str, str], set[str]]:
    """(case, dtype) -> the kernels that ran; the tests below fill it."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("dtype, check", ORDINARY, ids=lambda value: getattr(value, "name", value))
def test_compiled_kernels_compute_what_the_reference_does(dtype, check, ran):
    gpu = check.run(dtype, ARCHITECTURE)
    ran[check.name, dtype] = {launch.kernel.name for launch in gpu.launches}


@pytest.mark.slow
@pytest.mark.parametrize("name, architecture, opcode", NEWER, ids=str)
def test_instructions_of_newer_generations(name, architecture, opcode):
    """Hopper's products of warpgroups, which its largest tiles take, and Blackwell's pairs of float32."""
    (check,) = [check for check in every_check() if check.name == name]
    gpu = check.run("bf16", architecture, multiprocessors=1)
    assert any(key.startswith(opcode) for launch in gpu.launches for key in launch.executed)


@pytest.mark.slow
def test_every_kernel_was_run(ran):
    """In both dtypes, or by default in bfloat16."""
    if len(ran) != len(ORDINARY):
        pytest.skip("some of the cases were not selected")
    written = set()
    for path in (ROOT / "pcs_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                written.add(node.name)
    assert len(written) > 20
    for dtype in DTYPES if EVERY_CASE else ("bf16",):
        missing = written - set().union(*(kernels for (_, kind), kernels in ran.items() if kind == dtype))
        assert not missing, f"{dtype}: no case of tests/ptx/cases.py runs {sorted(missing)}"


@pytest.mark.slow
def test_a_whole_training_step_runs_through_compiled_kernels():
    """Forward and backward of Personalized Residuals: the gradient errs at most twice what low-precision torch errs."""
    step = Step.make(torch.bfloat16)
    found, gpu = step.compiled(torch.bfloat16, ARCHITECTURE)
    exact, low = step.gradient("reference", torch.float32), step.gradient("reference", torch.bfloat16)
    kernels = {launch.kernel.name for launch in gpu.launches}
    # the tiny model's norms are of whole groups: two kernels do what six would
    assert {"gn_group_kernel", "gn_group_bwd_kernel"} < kernels and len(kernels) > 13
    assert float((found - exact).norm()) <= 2 * float((low - exact).norm())


@pytest.mark.slow
def test_the_features_of_a_few_rows_are_shared_among_programs():
    """16 rows are one program of a projection; its splits are added in order."""
    torch.manual_seed(0)
    x, weight, down, up = op_cases.normal(16, 640), op_cases.normal(64, 640), op_cases.normal(64, 640), None
    weight, down, up = weight / 25, down / 25, op_cases.normal(64, 64)
    case = op_cases.Case("few rows", lambda *t: pcs_kernels.lowrank_residual(*t), [x, weight, up[0], down, up])
    gpu = of_case(case).run("bf16", ARCHITECTURE)
    (_, _, splits), *_ = [launch.grid for launch in gpu.launches if launch.kernel.name == "lowrank_project_kernel"]
    assert splits == 640 // (2 * 32), "two steps of 32 features a program"


@pytest.mark.slow
@pytest.mark.parametrize("size", ((700, 33), (5, 4100), (1, 7)), ids=str)
def test_partial_sums_of_many_slots(size):
    torch.manual_seed(0)
    part, owner = torch.randn(size), torch.randint(0, 3, (size[0],))
    with device(ARCHITECTURE) as gpu:
        found = sum_partials(part, part.new_empty(size[1]))
        owned = sum_partials(part, part.new_empty(3, size[1]), owner)
    exact = part.double()
    each = torch.stack([exact[owner == j].sum(0) for j in range(3)])
    tolerance = 2 * torch.finfo(torch.float32).eps * float(exact.abs().sum(0).max())
    assert float((found - exact.sum(0)).abs().max()) <= tolerance
    assert float((owned - each).abs().max()) <= tolerance
    assert {launch.kernel.name for launch in gpu.launches} == {"sum_partials_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_kernel_is_caught_by_the_check_that_is_there_for_it(mutant):
    assert mutants.caught_by(mutant, ARCHITECTURE) == mutant.caught_by


def test_the_page_lists_the_mutants():
    assert report.mutants_table() in report.PAGE.read_text(), "run python -m tests.ptx --page"


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_a_program_moves_no_more_than_it_must_and_multiplies_by_matrix_instructions(op):
    """At a real shape: sectors of each request and passes over the banks are the fewest there can be, or a named
    exception's. Kernels of products that had fallen back to plain arithmetic would be right and slow."""
    kernels = counted(op, ARCHITECTURE, report.shown_shape(op))
    assert kernels, f"no launch of {op} is called {report.SHOWN[op]}"
    wasteful = report.wasteful(kernels)
    assert not wasteful, "\n".join(wasteful)
    recorded = report.recorded(op, ARCHITECTURE)
    for kernel in kernels:
        most = max((k["instructions"] for k in recorded if k["name"] == kernel.name), default=0)
        assert kernel.instructions <= most, f"{kernel.name} executes {kernel.instructions} instructions, {most} before"
    if op in PRODUCTS:
        plain = [k.name for k in kernels if not k.matrix and not k.name.startswith("sum_partials")]
        assert not plain, f"their products run on plain arithmetic: {plain}"


@pytest.mark.slow
def test_a_captured_step_does_nothing_until_its_table_is_sent(monkeypatch):
    """While a graph is captured no address may be sent: `prepare` sends them, and the next replay steps."""
    params = [torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (5000, 77)]
    optimizer = AdamW8bit(params, lr=1e-2)
    with device(ARCHITECTURE), pcs_kernels.backend("triton"):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        before = [p.detach().clone() for p in params]
        for module in (adamw8bit, together):
            monkeypatch.setattr(module, "capturing", lambda: True)
        for p in params:
            p.grad = torch.ones_like(p)  # elsewhere
        optimizer.step()  # the capture: what it launches finds a table of zeros
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        optimizer.prepare()
        optimizer.step()  # the replay
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert [s["step"] for s in optimizer.state_dict()["state"].values()] == [2, 2]
    for p in params:
        p.grad = torch.ones_like(p)
    with (
        device(ARCHITECTURE),
        pcs_kernels.backend("triton"),
        pytest.raises(RuntimeError, match="take one step before each CUDA graph"),
    ):
        optimizer.step()  # another capture without a step between them


def test_an_instruction_that_is_not_known_is_refused():
    head = ".visible .entry k(\n.param .u32 k_param_0\n)\n.reqntid 32\n"
    ptx = head + "{\n.reg .b32 %r<2>;\n\tpopc.b32 %r1, 3;\n\tret;\n}\n"
    kernel = parse(ptx)
    assert [one.opcode for one in kernel.instructions] == ["popc", "ret"] and kernel.threads == 32
    with device(ARCHITECTURE) as gpu, pytest.raises(UnknownInstruction, match="popc is not known here"):
        gpu.run(ptx, (1, 1, 1), 0, [("i32", 5)])


def test_names_of_the_ordinary_cases_are_those_of_the_op_cases():
    names = [check.name for check in every_check()]
    assert len(names) == len(set(names)) and len(ordinary_checks()) < len(names)
    assert all(re.match(r"\w", check.name) for check in ordinary_checks())
