"""The tables of README.md, and which traffic is more than it need be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .counting import Counted
from .mutants import MUTANTS

PAGE = Path(__file__).with_name("README.md")
COUNTS = Path(__file__).with_name("counted.json")


class Allowed(NamedTuple):
    """Accesses that move more than their bytes fill, up to `ratio`, and why they must."""

    kernel: str  # a pattern of the name of kernel and shape
    access: str  # a pattern of the kind
    ratio: float
    reason: str


EXCEPTIONS = (
    Allowed(
        r"^(cross|self)_\w+ SD1.5 64x64",
        r"^global",
        2.0,
        "a row of a head of 40 is 80 bytes, two and a half sectors; every second one begins within a sector",
    ),
    Allowed(
        r"^cross_\w+ .* capture$",
        r"^global load 4$",
        1.5,
        "a row of weights of 77 tokens is 308 bytes and begins within a sector",
    ),
    Allowed(
        r"^gn_(bwd_)?combine_kernel",
        r"^global load 4$",
        1.75,
        "a group of ten channels has ten float32 sums a split: 40 bytes, anywhere in two or three sectors",
    ),
    Allowed(
        r"^gn_(apply|bwd_sums|bwd_x)_kernel .* NHWC",
        r"^global load 4$",
        1.25,
        "the few groups of a tile's channels: their statistics lie across a sector's end",
    ),
    Allowed(
        r"^gn_group_(bwd_)?kernel .* NHWC",
        r"^global",
        1.6,
        "a group of 40 or 20 channels is 80 or 40 bytes a pixel and begins or ends within a sector; its neighbour's"
        " program asks for the rest",
    ),
    Allowed(
        r"^lowrank_(product|project)_kernel .*r(4|16|32|64) ",
        r"^shared load (4|16)$",
        2.0,
        "float32 adapters beside 16-bit activations: mma takes two ranks of a row, which lie 8 bytes apart; less than a"
        " fifth of what the product takes, and a cast is one more launch",
    ),
    Allowed(
        r"^lowrank_product_kernel SDXL",
        r"^(global|shared) copy 16$",
        1.09,
        "the last two steps: s and the second adapter have tiles of one shape, so that a thread copies 32 bytes of"
        " float32 by two requests",
    ),
    Allowed(
        r"^adamw32bit_kernel",
        r"^global",
        1.67,
        "float32 states beside 16-bit parameters: 32 bytes a thread, by two requests that each use half of a sector",
    ),
)
# the real shape at which the ordinary test run counts; `make ptx` counts at all of them
SHOWN = {
    "geglu": "SD1.5 bf16",
    "group_norm_silu": "SD1.5 64x64 NHWC bf16",
    "cross_attention": "SD1.5 64x64 bf16",
    "self_attention": "SD1.5 32x32 bf16",
    "lowrank_residual": "SD1.5 64x64 r16 bf16",
    "adamw8bit": "SDXL 1280x10240 bf16",
    "frozen_conv": "SD1.5 64x64 320 bf16",
    "int8_weight": "SD1.5 conv 1280 bf16",
}
# more of the ops whose tiles differ most by shape: with SHOWN's, what benchmarks/roofline.py tells of
ALSO = {
    "group_norm_silu": ("SD1.5 16x16 NHWC bf16", "SD1.5 8x8 NHWC bf16"),
    "lowrank_residual": ("SD1.5 8x8 r64 bf16", "SDXL 64x64 r32 bf16", "SDXL 32x32 r64 bf16"),
}


def recorded(op: str, architecture: int) -> list[dict[str, Any]]:
    """What `make ptx` counted of the op's launches."""
    return json.loads(COUNTS.read_text(encoding="utf-8"))[f"sm_{architecture}"][op]


def shown_shape(op: str) -> Callable[[str], bool]:
    return lambda label: label == SHOWN[op]


def some_shapes(op: str) -> Callable[[str], bool]:
    return lambda label: label in (SHOWN[op], *ALSO.get(op, ()))


def wasteful(kernels: list[Counted]) -> list[str]:
    """A sentence for each access above its limit: 1.0, or a named exception's."""
    found = []
    for kernel in kernels:
        for access, ratio in kernel.ratios.items():
            limits = [e.ratio for e in EXCEPTIONS if re.search(e.kernel, kernel.name) and re.search(e.access, access)]
            if ratio > max(limits, default=1.0):
                found.append(f"{kernel.name}: {access} bytes moves {ratio} times what it must")
    return found


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def mutants_table() -> str:
    names = {"values": "values: further from the reference than low-precision torch"}
    rows = [(m.name, f"`{m.kernel}`", names.get(m.caught_by, f"`{m.caught_by}`")) for m in MUTANTS]
    return _table(("mutant", "kernel", "caught by"), rows)


def exceptions_table() -> str:
    rows = [(f"`{e.kernel}`", f"`{e.access}`", f"{e.ratio:g}", e.reason) for e in EXCEPTIONS]
    return _table(("kernels", "access", "ratio", "reason"), rows)


def write(section: str, text: str) -> None:
    """Puts `text` between the page's two marks of that section."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {section} -->\n", f"<!-- end of {section} -->\n"
    head, rest = page.split(begin)
    _, tail = rest.split(end)
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(head + begin + text + end + tail, encoding="utf-8")
    temporary.replace(PAGE)
