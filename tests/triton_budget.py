"""Ahead-of-time compilation of every Triton kernel, and the budget of registers, spills and shared memory.

`python tests/triton_budget.py` compiles all ops for all architectures and rewrites triton_budget.json;
`python tests/triton_budget.py geglu 80` only prints one op's numbers for one architecture, `geglu gfx942` AMD's, and
`all gfx942` rewrites what the budget says of that one.
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
    "int8_weight",
)
PRODUCTS = ("cross_attention", "self_attention", "lowrank_residual", "frozen_conv")
AMD_ARCHS = (0x942, 0x1100, 0x1030)  # a CDNA3, an RDNA3 and an RDNA2 card, as torch's ROCm builds support them
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

    from pcs_kernels._launch import AMD, arch_name

    case = cases_of(op, arch)[index]
    source = ASTSource(case.fn, case.signature, case.constexprs, case.attrs)
    if arch in AMD:
        wave = 64 if arch < 0x1000 else 32  # threads of a warp: CDNA has 64, RDNA 32
        compiled = triton.compile(source, target=GPUTarget("hip", arch_name(arch), wave), options=case.options)
        text = compiled.asm["amdgcn"]
        matrix = len(re.findall(r"\bv_s?w?mf?mac?_", text))
        return _amd_resources(text) | {"shared": compiled.metadata.shared, "matrix": matrix}
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


def _amd_resources(assembly: str) -> dict[str, int]:
    """Vector registers a thread and bytes of spilled ones, as AMD's assembler notes them."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    assert registers and spilled, "the assembly names no registers"
    return {"registers": int(registers[1]), "spill": 4 * int(spilled[1])}


def amd_ops(arch: int) -> tuple[str, ...]:
    """The ops that an AMD architecture runs: on one without matrix instructions those without products."""
    from pcs_kernels._launch import arch_reason

    return tuple(op for op in OPS if op not in PRODUCTS or arch_reason(arch, dots=True) is None)


def amd_jobs(arch: int) -> list[tuple[str, int, int]]:
    """With PCS_EVERY_CASE all specialisations, else one of each kernel."""
    from tests.every_case import EVERY_CASE

    jobs = jobs_for(amd_ops(arch), (arch,))
    if EVERY_CASE:
        return jobs
    first: dict[tuple[str, str], tuple[str, int, int]] = {}
    for op, _, index in jobs:
        first.setdefault((op, cases_of(op, arch)[index].fn.__name__), (op, arch, index))
    return list(first.values())


def measure(jobs: list[tuple[str, int, int]]) -> list[dict[str, int]]:
    """All jobs on the cores of this machine, in fresh processes."""
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), 8), mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_case, jobs))


def jobs_for(ops: tuple[str, ...], archs: tuple[int, ...]) -> list[tuple[str, int, int]]:
    return [(op, arch, i) for op in ops for arch in archs for i in range(len(cases_of(op, arch)))]


def architectures() -> tuple[int, ...]:
    """Those that the tests compile for: all with PCS_EVERY_CASE, else one of each kind (89 is compiled as 86 is, and
    100 as 90 with more)."""
    from pcs_kernels._launch import AOT_ARCHS
    from tests.every_case import EVERY_CASE

    return AOT_ARCHS if EVERY_CASE else tuple(a for a in AOT_ARCHS if a not in (89, 100))


def all_jobs() -> list[tuple[str, int, int]]:
    return jobs_for((ODD,), (ODD_ARCH,)) + jobs_for(OPS, architectures())


def table(jobs: list[tuple[str, int, int]], results: list[dict[str, int]]) -> dict[str, dict]:
    """op -> kernel and shape -> sm_xx or gfxxxx -> [registers, spill, shared]."""
    from pcs_kernels._launch import arch_name

    numbers: dict[str, dict[str, dict[str, list[int]]]] = {}
    for (op, arch, index), result in zip(jobs, results, strict=True):
        label = labels_of(op, arch)[index]
        numbers.setdefault(op, {}).setdefault(label, {})[arch_name(arch)] = [result[f] for f in FIELDS]
    return numbers


def merged(before: dict, now: dict) -> dict:
    """The budget with some architectures measured anew."""
    for op, kernels in now.items():
        for name, by_arch in kernels.items():
            before.setdefault(op, {}).setdefault(name, {}).update(by_arch)
    return before


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

    asked = sys.argv[2] if len(sys.argv) > 2 else ""
    archs = (int(asked.removeprefix("gfx"), 16 if asked.startswith("gfx") else 10),) if asked else AOT_ARCHS
    whole = sys.argv[1:2] in ([], ["all"])
    jobs = jobs_for(OPS if whole else (sys.argv[1],), archs)
    if whole:
        amd = [arch for arch in (archs if asked else AMD_ARCHS) if arch in AMD_ARCHS]
        jobs = [j for j in jobs if j[1] not in AMD_ARCHS] + [j for a in amd for j in jobs_for(amd_ops(a), (a,))]
    numbers = table(jobs, measure(jobs))
    if whole:
        write(numbers if not asked else merged(json.loads(BUDGET.read_text())["ops"], numbers))
    for op, kernels in numbers.items():
        for name, by_arch in kernels.items():
            print(f"{op:18} {name:56}", *(f"{arch} {values}" for arch, values in by_arch.items()))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
