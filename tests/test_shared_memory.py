"""Shared memory by formula, held against what Triton's compiler allots, and no accepted call above a card's limit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed here; there are no kernels to compile")

from pcs_kernels import _launch
from pcs_kernels._launch import SHARED_LIMIT, meta, record, recording
from pcs_kernels.ops.cross_attention import triton_impl as cross
from pcs_kernels.ops.lowrank_residual import triton_impl as lowrank
from tests import triton_budget
from tests.every_case import cases
from tests.shared_memory import allotted

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="TRITON_INTERPRET=1: interpreted kernels do not compile")
WHOLE, HALF = torch.float32, torch.bfloat16
EVERY, QUERIES = cross.Needs(True, True, True), cross.Needs(True, False, False)


def constants(case) -> dict:
    return {case.fn.arg_names[at[0]]: value for at, value in case.constexprs.items()}


def attention_calls(width: int, tokens: int, dtype: torch.dtype, heads: int = 2):
    """q and k, and the calls that take most of one shape: forward with maps, whole backward, backward to q alone."""
    q, k = (meta(1, n, heads, width, dtype=dtype).transpose(1, 2) for n in (1024, tokens))
    c, d = (meta(1, 2, n, dtype=WHOLE) for n in (tokens, 1024))
    calls = (
        lambda: cross.forward(q, k, k, c, 0.1),
        lambda: cross.backward(q, d, q, k, k, c, 0.1, EVERY),
        lambda: cross.backward(q, None, q, k, k, None, 0.1, QUERIES),
    )
    return q, k, calls


def lowrank_calls(rank: int, dtype: torch.dtype):
    x, weight = meta(1, 256, 320, dtype=dtype), meta(320, 320, dtype=dtype)
    down, up = meta(rank, 320, dtype=WHOLE), meta(320, rank, dtype=WHOLE)
    needs = lowrank.Needs(True, False, False, True, True, False)
    return (lambda: lowrank.backward(x, x, weight, down, up, None, 1.0, None, needs),)


def bound_of(case, tokens: int = 0) -> int | None:
    """Our formula for a recorded launch, or None for a kernel without one."""
    tiles, name = constants(case), case.fn.__name__
    size = 4 if case.signature[case.fn.arg_names[0]] == "*fp32" else 2
    if name == "lowrank_project_kernel":
        return lowrank.project_bound(tiles["PAD"], tiles["BLOCK_M"], tiles["BLOCK_K"], size, case.options["num_stages"])
    if name not in ("cross_fwd_kernel", "cross_bwd_rows_kernel"):
        return None
    forward = cross.Kernel.CAPTURE if tiles.get("CAPTURE") else cross.Kernel.FORWARD
    kernel = cross.Kernel.ROWS if name == "cross_bwd_rows_kernel" else forward
    saves = bool(tiles.get("SAVE_ROWS"))
    return cross.shared_bound(tiles["BLOCK_N"], tokens, tiles["D"], size, kernel, case.options["num_stages"], saves)


def compiled(arch: int, calls) -> list[tuple]:
    """(recorded launch, bytes that the compiler allots it) of each distinct launch of the calls."""
    cases = {case.key: case for call in calls for case in record(arch, "", call)}.values()
    return [(case, allotted(case, arch)) for case in cases if not case.fn.__name__.startswith("sum_partials")]


# calls that once took more than the 99 KiB of sm_86, sm_89 and sm_120 (118 to 184 KiB), and ordinary ones beside them
ATTENTION = [(160, 77, WHOLE), (40, 231, WHOLE), (64, 231, WHOLE), (80, 154, WHOLE), (160, 77, HALF), (160, 320, HALF)]


@pytest.mark.parametrize("width, tokens, dtype", ATTENTION)
def test_accepted_attention_fits_a_card_of_99_kib(width, tokens, dtype):
    q, k, calls = attention_calls(width, tokens, dtype)
    with recording(86):
        assert cross.reason(q, k, k) is None
    for case, shared in compiled(86, calls):
        bound = bound_of(case, tokens)
        assert shared <= SHARED_LIMIT[86], f"{case.fn.__name__} takes {shared}"
        assert bound is None or shared <= bound, f"{case.fn.__name__} takes {shared}, the formula says {bound}"


def test_attention_that_no_tile_fits_is_refused_with_the_numbers():
    for width, tokens, dtype in ((160, 320, WHOLE), (256, 320, HALF), (160, 154, WHOLE)):
        q, k, calls = attention_calls(width, tokens, dtype)
        calls = calls[:1] if tokens == 320 else calls[1:2]
        with recording(86):
            reason = cross.reason(q, k, k)
        assert reason is not None and str(SHARED_LIMIT[86]) in reason and "shared memory" in reason
        assert max(shared for _, shared in compiled(86, calls)) > SHARED_LIMIT[86], "refused, and would fit"
        with recording(90):
            fits = max(shared for _, shared in compiled(90, calls)) <= SHARED_LIMIT[90]
            assert fits == (cross.reason(q, k, k) is None)


@pytest.mark.parametrize("dtype", [HALF, WHOLE])
def test_every_rank_fits_a_card_of_99_kib(dtype):
    for case, shared in compiled(86, lowrank_calls(lowrank.MAX_RANK, dtype)):
        bound = bound_of(case)
        assert shared <= SHARED_LIMIT[86], f"{case.fn.__name__} takes {shared}"
        assert bound is None or shared <= bound, f"{case.fn.__name__} takes {shared}, the formula says {bound}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", cases([86, 90], [a for a in triton_budget.architectures() if a not in (86, 90)]))
def test_the_formulas_are_upper_bounds_of_every_launch_of_the_tables(arch):
    held = 0
    for op in ("cross_attention", "lowrank_residual"):
        for case in triton_budget.cases_of(op, arch):
            tokens = 154 if "long prompt" in case.name else 77
            bound = bound_of(case, tokens)
            if bound is not None:
                shared = allotted(case, arch)
                assert shared <= bound, f"{case.name} on sm_{arch} takes {shared}, the formula says {bound}"
                held += 1
    assert held > 10


# The other cards take half a minute each: with PCS_EVERY_CASE.
@pytest.mark.slow
@pytest.mark.parametrize("arch", cases([86], [90, 120]))
def test_no_accepted_attention_exceeds_any_card(arch):
    """Both dtypes, and every kind of call, at widths and numbers of tokens with one part and with two."""
    for dtype in (HALF, WHOLE):
        for width in cases([160], [64]):
            for tokens in (77, 231, 320):
                q, k, calls = attention_calls(width, tokens, dtype, heads=16)
                c, d = (meta(1, 2, n, dtype=WHOLE) for n in (tokens, 1024))
                calls += (
                    lambda: cross.forward(q, k, k, None, 0.1),
                    lambda: cross.backward(None, d, q, k, k, c, 0.1, QUERIES),
                    lambda: cross.backward(q, None, q, k, k, None, 0.1, EVERY),
                )
                with recording(arch):
                    if cross.reason(q, k, k) is not None:
                        continue
                for case, shared in compiled(arch, calls):
                    what = f"{case.fn.__name__} {dtype} D={width} T={tokens}"
                    assert shared <= SHARED_LIMIT[arch], f"{what} takes {shared}"
                    assert (bound_of(case, tokens) or shared) >= shared, f"{what} takes {shared}"


def test_the_quick_number_is_the_compilers_own():
    """`allotted` stops before LLVM: it must say what a whole compilation says."""
    case = triton_budget.cases_of("cross_attention", 86)[0]
    assert allotted(case, 86) == triton_budget.compile_case(("cross_attention", 86, 0))["shared"] > 0
