"""What our Triton kernels can reach on a card, from what they execute: python benchmarks/roofline.py

Takes a few seconds; with --save it writes benchmarks/results/roofline.md. A model, and no measurement:
tests/ptx/counted.json holds what one program of each launch executes and moves at the models' real shapes, counted from
the compiled code (`make ptx`). From it, three times that no card can go below:

    issue    programs x warps x instructions, at two instructions a cycle and multiprocessor
    memory   the bytes of the launch's tensors, each moved once, at the card's bandwidth (a tensor that is read and
             written takes twice that)
    product  programs x warps x mma instructions x 4096 operations, at the card's 16-bit rate with float32 sums

The largest binds. Left out: the latency of few programs, launches, caches, conflicts among the three.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COUNTED = ROOT / "tests" / "ptx" / "counted.json"
SAVED = ROOT / "benchmarks" / "results" / "roofline.md"
MMA = 2 * 16 * 8 * 16  # operations of one mma.m16n8k16


class Card(NamedTuple):
    """NVIDIA's data sheets: multiprocessors, boost clock in GHz, TB/s, dense TFLOP/s."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    products: float


# both run the counted code: sm_86, and sm_89 with the same instructions
CARDS = (Card("RTX 3060", 28, 1.78, 0.36, 25.6), Card("RTX 4090", 128, 2.52, 1.008, 165.2))


def times(kernel: dict[str, Any], card: Card) -> dict[str, float]:
    """Microseconds."""
    warps = kernel["programs"] * kernel["warps"]
    return {
        "issue": warps * kernel["instructions"] / (2 * card.multiprocessors * card.clock * 1e3),
        "memory": kernel["tensor_bytes"] / (card.bandwidth * 1e6),
        "product": warps * kernel["matrix"] * MMA / (card.products * 1e6),
    }


def table() -> str:
    head = ["kernel and shape", "programs x warps", "instructions", "mma", "MB of tensors", "MB asked for"]
    for card in CARDS:
        head += [f"{card.name}: issue", "memory", "product", "binds"]
    lines = [head, ["---"] * len(head)]
    counted = json.loads(COUNTED.read_text())
    for kernels in counted.values():
        for kernel in kernels if isinstance(kernels, list) else []:
            size = f"{kernel['programs']} x {kernel['warps']}"
            numbers = [kernel["name"], size, f"{kernel['instructions']:,}", kernel["matrix"]]
            asked = 32 * kernel["sectors"] * kernel["programs"]  # of the caches: what programs read again counts again
            line = [*map(str, numbers), f"{kernel['tensor_bytes'] / 1e6:.1f}", f"{asked / 1e6:.1f}"]
            for card in CARDS:
                found = times(kernel, card)
                line += [*(f"{time:.1f}" for time in found.values()), max(found, key=found.__getitem__)]
            lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page() -> str:
    return (
        "# What the compiled kernels can reach: microseconds, modelled\n\n"
        "Written by `python benchmarks/roofline.py --save`, which says what each column is.\n\n"
        f"{table()}\n"
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
