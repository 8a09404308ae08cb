"""What our Triton kernels can reach on a card, from what they execute: python benchmarks/roofline.py

Takes a few seconds; with --save it writes benchmarks/results/roofline.md. A model, and no measurement:
tests/ptx/counted.json holds what one program of each launch executes and moves at the models' real shapes, counted from
the code compiled for each card (`make ptx`). A card's roofline is the larger of two times that nothing can go below:

    memory   the bytes of the launch's tensors, each moved once, at the card's bandwidth (a tensor that is read and
             written takes twice that)
    product  programs x warps x mma instructions x 4096 operations, at the card's 16-bit rate with float32 sums

What binds a kernel is the largest of these and of what the busiest multiprocessor has to do, which has
programs / multiprocessors, rounded up:

    issue    its warps' instructions, at two a cycle
    matrix   its matrix products, at its share of the card's rate
    banks    its passes over the banks of shared memory, one a cycle
    sectors  its sectors of global memory, at 64 bytes a cycle from the cache

Left out: the latency of dependent loads, launches (2 us each, 1 us in a graph), conflicts among these.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COUNTED = ROOT / "tests" / "ptx" / "counted.json"
SAVED = ROOT / "benchmarks" / "results" / "roofline.md"
MMA = 2 * 16 * 8 * 16  # operations of one mma.m16n8k16


class Card(NamedTuple):
    """NVIDIA's data sheets: architecture, multiprocessors, boost clock in GHz, TB/s, dense TFLOP/s."""

    name: str
    architecture: int
    multiprocessors: int
    clock: float
    bandwidth: float
    products: float


CARDS = (
    Card("H100", 90, 132, 1.83, 3.35, 989.4),
    Card("RTX 4090", 89, 128, 2.52, 1.008, 165.2),
    Card("RTX 3060", 86, 28, 1.78, 0.36, 25.6),
)
GOOD = 0.7
SHORT = 2.0  # us: as long as a launch


class Reason(NamedTuple):
    """Why kernels whose name and binding time match stay below GOOD."""

    kernel: str
    binds: str
    text: str


REASONS = (
    Reason("^adamw8bit", "issue", "two codes looked up and found anew, 800 instructions for 8 elements of a thread"),
    Reason("^frozen_conv", "", "runs where it is asked for by name; cuDNN takes this convolution"),
    Reason("^self_", "", "the fallback for float32 and odd widths; flash attention takes this shape"),
    Reason("^geglu", "issue", "erf is a polynomial"),
    Reason("^cross_fwd", "issue", "a softmax of 77 tokens beside two short products"),
    Reason("^cross_", "matrix", "few programs at 32 x 32 and below; with capture each takes all heads of its queries"),
    Reason("^cross_bwd_tokens", "issue|banks", "every query's softmax anew; the tiles of 77 tokens are padded to 80"),
    Reason("^cross_bwd_rows", "issue", "a softmax of 77 tokens beside three short products"),
    Reason("^gn_bwd_", "issue", "SiLU's slope of each element, read as 8 elements of two inputs a thread"),
    Reason("^gn_group", "issue", "32 programs for a sample, 40 channels in a tile of 64; three launches take longer"),
    Reason("^sum_partials", "issue", "short sums: addresses and the loop take more than the additions"),
    Reason("^lowrank_product", "matrix", "few tiles for the multiprocessors; smaller ones would read more"),
    Reason("^lowrank_product", "issue|banks|sectors", "few tiles of few steps; large images and batches have more"),
)


class Times(NamedTuple):
    """Microseconds of a kernel on a card."""

    roofline: dict[str, float]
    busiest: dict[str, float]

    @property
    def least(self) -> float:
        return max(self.roofline.values())

    @property
    def binds(self) -> str:
        every = self.roofline | self.busiest
        return max(every, key=every.__getitem__)

    @property
    def modelled(self) -> float:
        return max((self.roofline | self.busiest).values())

    @property
    def share(self) -> float:
        return self.least / self.modelled


def times(kernel: dict[str, Any], card: Card) -> Times:
    rounds = -(-kernel["programs"] // card.multiprocessors)
    warps, cycle = kernel["warps"], card.clock * 1e3
    operations = warps * kernel["matrix"] * MMA
    roofline = {
        "memory": kernel["tensor_bytes"] / (card.bandwidth * 1e6),
        "product": kernel["programs"] * operations / (card.products * 1e6),
    }
    busiest = {
        "issue": rounds * warps * kernel["instructions"] / (2 * cycle),
        "matrix": rounds * operations * card.multiprocessors / (card.products * 1e6),
        "banks": rounds * kernel["passes"] / cycle,
        "sectors": rounds * kernel["sectors"] * 32 / (64 * cycle),
    }
    return Times(roofline, busiest)


def kernels_of(card: Card) -> dict[str, dict[str, Any]]:
    """By name; the second of a name, which is the backward's, has #2."""
    found: dict[str, dict[str, Any]] = {}
    for kernels in json.loads(COUNTED.read_text())[f"sm_{card.architecture}"].values():
        for kernel in kernels:
            earlier = sum(name.split(" #")[0] == kernel["name"] for name in found)
            found[kernel["name"] + (f" #{earlier + 1}" if earlier else "")] = kernel
    return found


def rows(lines: list[list[str]]) -> str:
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(card: Card) -> str:
    head = ["kernel and shape", "programs x warps", "instructions", "mma", "MB of tensors", "MB asked for"]
    lines = [[*head, "roofline", "binds", "modelled", "share"]]
    for name, kernel in kernels_of(card).items():
        found = times(kernel, card)
        asked = 32 * kernel["sectors"] * kernel["programs"]  # of the caches: what programs read again counts again
        size = f"{kernel['programs']} x {kernel['warps']}"
        line = [name, size, f"{kernel['instructions']:,}", f"{kernel['matrix']:,}"]
        line += [f"{kernel['tensor_bytes'] / 1e6:.1f}", f"{asked / 1e6:.1f}", f"{found.least:.1f}"]
        lines.append([*line, found.binds, f"{found.modelled:.1f}", f"{found.share:.0%}"])
    return rows(lines)


def why(name: str, found: Times) -> str:
    """Why it is below GOOD; a kernel without a reason is an error."""
    if found.modelled <= SHORT:
        return "shorter than its launch"
    for reason in REASONS:
        if re.search(reason.kernel, name) and re.search(reason.binds, found.binds):
            return reason.text
    raise SystemExit(f"{name} is at {found.share:.0%}, bound by {found.binds}. Fix: mend it, or say why in REASONS")


def below() -> str:
    lines = [["kernel and shape", "card", "share", "us", "binds", "why"]]
    for card in CARDS:
        for name, kernel in kernels_of(card).items():
            found = times(kernel, card)
            if found.share < GOOD:
                what = [name, card.name, f"{found.share:.0%}", f"{found.modelled:.1f}", found.binds]
                lines.append([*what, why(name, found)])
    return rows(lines)


def page() -> str:
    tables = "\n\n".join(f"## {card.name}, sm_{card.architecture}\n\n{table(card)}" for card in CARDS)
    return (
        "# What the compiled kernels can reach: microseconds, modelled\n\n"
        "Written by `python benchmarks/roofline.py --save`, which says what each column is.\n\n"
        f"{tables}\n\n## Below {GOOD:.0%}\n\n{below()}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.relative_to(ROOT)}")
    given = parser.parse_args()
    text = page()
    if given.save:
        temporary = SAVED.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, SAVED)
    print(text)


if __name__ == "__main__":
    main()
