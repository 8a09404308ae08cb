"""Kernels broken on purpose, in their PTX: each must be caught, and by the check that is there for it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import faults
from .cases import every_check

VALUES = "values"  # no fault, but other numbers than the reference


@dataclass(frozen=True)
class Mutant:
    name: str
    case: str  # of cases.py
    kernel: str
    pattern: str  # the first match is replaced, or all of them
    replacement: str
    caught_by: str  # a class of faults.py, or VALUES
    every: bool = False

    def change(self, ptx: str) -> str:
        if f".entry {self.kernel}(" not in ptx:
            return ptx
        changed, count = re.subn(self.pattern, self.replacement, ptx, count=0 if self.every else 1)
        if not count:
            raise ValueError(f"the mutant {self.name!r} finds nothing to change in {self.kernel}")
        return changed


ATTENTION, NORM = "self_attention (1, 2, 300, 77, 80)", "group_norm 64/32 contiguous silu in pieces"
GEGLU, ADAPTER = "geglu (7, 682)", "lowrank 100x64->640 r32 stacked"
A_OPERAND = r"(mma\.sync[^{]*\{[^}]*\}, )\{ (%r\d+), (%r\d+), (%r\d+), (%r\d+) \}"
MANY = "adamw many"
WAIT, BARRIER = r"cp\.async\.wait_group\s+\d+;", r"\tbar\.sync\s+0;"

MUTANTS = (
    Mutant(
        "mma's A with two of its registers exchanged",
        ATTENTION,
        "self_fwd_kernel",
        A_OPERAND,
        r"\1{ \2, \4, \3, \5 }",
        VALUES,
        every=True,
    ),
    Mutant(
        "a tile loaded without its transposition",
        ATTENTION,
        "self_fwd_kernel",
        r"(ldmatrix\S*)\.trans",
        r"\1",
        VALUES,
        every=True,
    ),
    Mutant(
        "the halves of a rounded pair exchanged",
        "geglu (2, 63, 160)",
        "geglu_fwd_kernel",
        r"(cvt\.rn\.bf16x2\.f32\s+%r\d+), (%r\d+), (%r\d+);",
        r"\1, \3, \2;",
        VALUES,
    ),
    Mutant(
        "a sum over a warp that takes the wrong neighbour",
        NORM,
        "gn_stats_kernel",
        r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 16,",
        r"\1, 8,",
        VALUES,
        every=True,
    ),
    Mutant("cp.async.wait_group removed", ATTENTION, "self_bwd_kv_kernel", WAIT, "", "InFlight", every=True),
    Mutant(
        "a wait that leaves one group more",
        ATTENTION,
        "self_bwd_q_kernel",
        r"cp\.async\.wait_group\s+0;",
        "cp.async.wait_group 1;",
        "InFlight",
        every=True,
    ),
    Mutant(
        "the barrier behind a wait removed",
        ATTENTION,
        "self_fwd_kernel",
        rf"({WAIT}\n){BARRIER}",
        r"\1",
        "Race",
        every=True,
    ),
    Mutant("every barrier removed", NORM, "gn_stats_kernel", BARRIER, "", "Race", every=True),
    Mutant(
        "a store to shared memory removed",
        NORM,
        "gn_stats_kernel",
        r"[^\n]*st\.shared\S*[^;]*;",
        "",
        "Uninitialised",
        every=True,
    ),
    Mutant(
        "a mask one element too wide",
        GEGLU,
        "geglu_fwd_kernel",
        r"setp\.lt\.s32(\s+%p\d+, %r\d+, %r\d+;)",
        r"setp.le.s32\1",
        "OutOfBounds",
        every=True,
    ),
    Mutant(
        "a store without its mask", GEGLU, "geglu_bwd_kernel", r"@%p\d+ (st\.global)", r"\1", "OutOfBounds", every=True
    ),
    Mutant(
        "an address two bytes further",
        ADAPTER,
        "lowrank_product_kernel",
        r"(st\.global\.v4\S* \[ %rd\d+) \+ 0",
        r"\1 + 2",
        "Misaligned",
    ),
    Mutant(
        "a slot of the partial sums left unwritten",
        NORM,
        "gn_stats_kernel",
        r"@%p\d+ st\.global[^;]*;",
        "",
        "Uninitialised",
    ),
    Mutant(
        "two programs that write one slot",
        GEGLU,
        "geglu_fwd_kernel",
        r"mov\.u32(\s+%r\d+), %ctaid\.x;",
        r"mov.u32\1, 0;",
        "Race",
    ),
    Mutant(
        "a barrier that half a warp reaches",
        NORM,
        "gn_stats_kernel",
        rf"{BARRIER}",
        "\tmov.u32 %r1, %tid.x;\n\tsetp.lt.s32 %p1, %r1, 16;\n\t@%p1 bar.sync 0;",
        "Divergence",
    ),
    Mutant(
        "programs that all take the first tile of the first tensor",
        MANY,
        "adamw8bit_many_kernel",
        r"mov\.u32(\s+%r\d+), %ctaid\.x;",
        r"mov.u32\1, 0;",
        "Race",
    ),
    Mutant(
        "a step that nobody counts",
        MANY,
        "adamw32bit_many_kernel",
        r"@%p\d+ st\.global\.b32[^;]*;",
        "",
        VALUES,
    ),
)


def caught_by(mutant: Mutant, architecture: int = 86) -> str:
    """What catches it in bfloat16: a fault's class, VALUES, or nothing."""
    check = next(c for c in every_check() if c.name == mutant.case)
    try:
        check.run("bf16", architecture, change=mutant.change)
    except faults.Fault as fault:
        return type(fault).__name__
    except AssertionError:
        return VALUES
    return ""
