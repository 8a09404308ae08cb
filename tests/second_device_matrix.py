"""What the second-device tests run, counted:  python tests/second_device_matrix.py

A row for each run of a method: the variant, the precision, and the settings beside the method's own defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests")]

from test_second_device import AFTER, INSIDE, METHODS, VARIANTS, together  # noqa: E402
from test_second_device_files import UP_SCALED  # noqa: E402
from trainer_cases import small_for  # noqa: E402

Row = tuple[str, str, str, str]  # method, variant, precision, options


def rows() -> Iterator[Row]:
    """Every training run of the tests over all methods and variants."""
    for method in METHODS:
        after = [f"{name}={value}" for name, value in small_for(method, **AFTER).items()]
        yield method, "default", "float32", ", ".join([*after, "masks", "resumed", "checked gradients"])
        inside = [f"{name}={value}" for name, value in small_for(method, **INSIDE).items()]
        yield method, "default", "bfloat16", ", ".join([*inside, f"{len(together(method))} subjects"])
    for method, variant in (parameter.values for parameter in VARIANTS):
        yield method, ", ".join(f"{name}={value}" for name, value in variant.items()), "float32", ""
    for method in UP_SCALED:
        yield method, "stage=super_resolution", "float32", "drawn by upscale"
    for inside in (True, False):
        yield "custom_diffusion", "default", "float32", f"accumulate=2, step_in_backward={inside}"
    yield "personalized_residuals", "default", "float32", "probe, previews"
    yield "personalized_residuals", "default", "float32", "snr_gamma=5.0, equal to the CPU's"


def main() -> int:
    found = list(rows())
    print("| method | variant | precision | options |\n|---|---|---|---|")
    for row in found:
        print("| " + " | ".join(row) + " |")
    options = {(method, variant, option) for method, variant, _, said in found for option in said.split(", ") if option}
    print(f"\n{len(found)} runs, {len({row[:2] for row in found})} of method and variant, ", end="")
    print(f"{len(options)} of method, variant and option")
    return 0


if __name__ == "__main__":
    sys.exit(main())
