"""Ahead-of-time compilation of every Triton kernel, and the budget of registers, spills and shared memory.

`python tests/triton_budget.py` compiles all ops for all architectures and rewrites triton_budget.json;
`python tests/triton_budget.py geglu 80` only prints one op's numbers for one architecture.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

OPS = (
    "geglu",
    "group_norm_silu",
    "cross_attention",
    "self_attention",
    "lowrank_residual",
    "adamw8bit",
    "frozen_conv",
)
ODD, ODD_ARCH = "odd", 86
BUDGET = Path(__file__).with_name("triton_budget.json")
FIELDS = ("registers", "spill", "shared")


def implementation(op: str):
    return importlib.import_module(f"pcs_kernels.ops.{op}.triton_impl")


@functools.cache
def cases_of(op: str, arch: int) -> list:
    """The op's distinct specialisations: shapes that lead to the same code appear once."""
    distinct: dict[str, object] = {}
    for case in odd_cases(arch) if op == ODD else implementation(op).aot_cases(arch):
        distinct.setdefault(case.key, case)
    return list(distinct.values())


def odd_cases(arch: int) -> list:
    """Calls outside the launch tables that must compile too: sizes of 1 (constants to the compiler), float32, masks."""
    import torch

    from pcs_kernels._launch import meta, record

    geglu, norm, cross = (implementation(op) for op in ("geglu", "group_norm_silu", "cross_attention"))
    attention, lowrank, conv = (implementation(op) for op in ("self_attention", "lowrank_residual", "frozen_conv"))
    full = torch.float32
    pixel, stats = meta(1, 1, 1, 1), meta(1, 1, dtype=full)
    three, some = cross.Needs(True, True, True), lowrank.Needs(True, False, False, True, True, False)
    square = meta(64, 64, dtype=full)
    one, wide = meta(1, 1, 1, 8), meta(1, 2, 80, 40, dtype=full)
    lse, maps, weight = meta(1, 2, 80, dtype=full), meta(1, 6, 80, dtype=full), meta(1, 1, 1, dtype=full)
    rows, adapter, stack = meta(2, 80, 64, dtype=full), meta(40, 64, dtype=full), meta(3, 1, 64, dtype=full)
    index, image = meta(2, dtype=torch.int64), meta(1, 8, 9, 9, dtype=full)
    widest = meta(256, 64, dtype=full), meta(64, 256, dtype=full)
    calls = (
        lambda: geglu.backward(meta(1, 1), meta(1, 2)),
        lambda: norm.forward(pixel, 1, None, None, 1e-5, True),
        lambda: norm.backward(pixel, pixel, stats, stats, 1, None, None, True, norm.Needs(True, True, True)),
        lambda: cross.forward(one, one, one, weight, 1.0),
        lambda: cross.backward(one, weight, one, one, one, weight, 1.0, three),
        lambda: cross.forward(wide, wide, wide, maps, 1.0),
        lambda: cross.backward(None, maps, wide, wide, wide, maps, 1.0, three),
        lambda: attention.forward(one, one, one, 1.0),
        lambda: attention.backward(wide, wide, wide, wide, wide, lse, 1.0),
        lambda: lowrank.forward(meta(1, 1), meta(1, 1), None, meta(1, 1), meta(1, 1), None, 1.0, None),
        lambda: lowrank.backward(rows, rows, square, adapter, adapter.t(), None, 1.0, None, some),
        lambda: lowrank.forward(rows, square, None, stack, stack.transpose(1, 2), None, 1.0, index),
        lambda: lowrank.forward(meta(1, 64, 64), meta(64, 64), None, *widest, None, 1.0, None),
        lambda: conv.forward_conv(image, meta(8, 8, 3, 3, dtype=full), None, 2, 0, True),
        lambda: conv.backward_linear(meta(1, 1), meta(1, 1), True),
    )
    return [case for number, call in enumerate(calls) for case in record(arch, f"odd {number}", call)]


def labels_of(op: str, arch: int) -> list[str]:
    """One unique name for each case: a second kernel of the same name and shape gets #2."""
    seen: dict[str, int] = {}
    labels = []
    for case in cases_of(op, arch):
        seen[case.name] = seen.get(case.name, 0) + 1
        labels.append(case.name if seen[case.name] == 1 else f"{case.name} #{seen[case.name]}")
    return labels


def compile_case(job: tuple[str, int, int]) -> dict[str, int]:
    """Registers and stack a thread, shared bytes a block, matrix instructions in the code, of case number `index`."""
    op, arch, index = job
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case = cases_of(op, arch)[index]
    source = ASTSource(case.fn, case.signature, case.constexprs, case.attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    registers, stack = _resources(compiled.asm["cubin"])
    matrix = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", compiled.asm["ptx"]))
    return {"registers": registers, "spill": stack, "shared": compiled.metadata.shared, "matrix": matrix}


def _resources(cubin: bytes) -> tuple[int, int]:
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, f"cuobjdump printed no resource usage: {text!r}"
    return int(found[1]), int(found[2])


def measure(jobs: list[tuple[str, int, int]]) -> list[dict[str, int]]:
    """All jobs on the cores of this machine, in fresh processes."""
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), 8), mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_case, jobs))


def jobs_for(ops: tuple[str, ...], archs: tuple[int, ...]) -> list[tuple[str, int, int]]:
    return [(op, arch, i) for op in ops for arch in archs for i in range(len(cases_of(op, arch)))]


def architectures() -> tuple[int, ...]:
    """Those that the tests compile for: all with PCS_EVERY_ARCH, else one of each kind (89 is compiled as 86 is, and
    100 as 90 with more)."""
    from pcs_kernels._launch import AOT_ARCHS

    return AOT_ARCHS if os.environ.get("PCS_EVERY_ARCH") else tuple(a for a in AOT_ARCHS if a not in (89, 100))


def all_jobs() -> list[tuple[str, int, int]]:
    return jobs_for((ODD,), (ODD_ARCH,)) + jobs_for(OPS, architectures())


def table(jobs: list[tuple[str, int, int]], results: list[dict[str, int]]) -> dict[str, dict]:
    """op -> kernel and shape -> sm_xx -> [registers, spill, shared]."""
    numbers: dict[str, dict[str, dict[str, list[int]]]] = {}
    for (op, arch, index), result in zip(jobs, results, strict=True):
        label = labels_of(op, arch)[index]
        numbers.setdefault(op, {}).setdefault(label, {})[f"sm_{arch}"] = [result[f] for f in FIELDS]
    return numbers


def write(numbers: dict) -> None:
    """One line a kernel and shape, so that a change of one number is a change of one line."""
    import triton

    lines = ["{", f' "triton": {json.dumps(triton.__version__)},', f' "fields": {json.dumps(FIELDS)},', ' "ops": {']
    for i, (op, kernels) in enumerate(numbers.items()):
        lines.append(f"  {json.dumps(op)}: {{")
        rows = [f"   {json.dumps(name)}: {json.dumps(by_arch)}" for name, by_arch in kernels.items()]
        lines.append(",\n".join(rows))
        lines.append("  }" + ("," if i + 1 < len(numbers) else ""))
    text = "\n".join([*lines, " }", "}"]) + "\n"
    json.loads(text)
    temporary = BUDGET.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, BUDGET)


def main() -> None:
    from pcs_kernels._launch import AOT_ARCHS

    ops = (sys.argv[1],) if len(sys.argv) > 1 else OPS
    archs = (int(sys.argv[2]),) if len(sys.argv) > 2 else AOT_ARCHS
    jobs = jobs_for(ops, archs)
    numbers = table(jobs, measure(jobs))
    if len(sys.argv) == 1:
        write(numbers)
    for op, kernels in numbers.items():
        for name, by_arch in kernels.items():
            print(f"{op:18} {name:56}", *(f"{arch} {values}" for arch, values in by_arch.items()))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
