"""Everything on a GPU in one command: python benchmarks/gpu.py --out results

For a machine without network that has torch, triton, numpy and pytest. Sections: `tests` (every Triton kernel against
the reference on the card), `rates` (the card's own matmul and copy rates), `ops` (the kernels against torch, xformers
and bitsandbytes where they are installed), `methods` (training steps of every method on SD1.5 and SDXL), `concept` (150
steps) and `lag`. Each section writes its own file into the --out folder as it ends.

How long it takes on a card has not been measured; `tests` is stopped after 400 s and `ops` after 500 s. --smoke runs
the same on the CPU with small shapes, in about two minutes on two cores; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / part) for part in ("benchmarks", "", "python")]

import timing
from gpu_methods import concept, lag, methods

ROOT = Path(__file__).parents[1]


def tests(out: Path, smoke: bool) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "tests/test_gpu.py"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    (out / "gpu_tests.txt").write_text(ran.stdout + ran.stderr)
    return ran.stdout.strip().splitlines()[-1] if ran.stdout.strip() else f"exit {ran.returncode}"


def rates(out: Path, smoke: bool) -> str:
    """bf16 matmul and device copy: the ceilings that other numbers are compared with."""
    n, device = (256, "cpu") if smoke else (8192, "cuda")
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    big = torch.randn(n * n * 4, device=device)
    seconds = timing.interleave({"matmul": lambda: a @ b, "copy": lambda: big.clone()}, rounds=5)
    found = {
        **timing.circumstances(),
        "bf16_tflops": 2 * n**3 / sorted(seconds["matmul"])[2] / 1e12,
        "copy_tb_per_s": 2 * big.nbytes / sorted(seconds["copy"])[2] / 1e12,
    }
    (out / "gpu_rates.json").write_text(json.dumps(found, indent=1) + "\n")
    return f"{found['bf16_tflops']:.2f} TFLOP/s bf16, {found['copy_tb_per_s']:.3f} TB/s copy"


def ops(out: Path, smoke: bool) -> str:
    command = [sys.executable, "benchmarks/run.py", "--device", "cpu" if smoke else "cuda"]
    command += ["--out", str(out / "ops_cuda.csv"), "--rounds", "3" if smoke else "15"]
    command += ["--op", "geglu"] if smoke else []
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    (out / "gpu_ops.txt").write_text(ran.stdout + ran.stderr)
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip().splitlines()[-1])
    return "\n" + ran.stdout


RUN = {"tests": tests, "rates": rates, "ops": ops, "methods": methods, "concept": concept, "lag": lag}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder to write to")
    parser.add_argument("--sections", nargs="+", choices=RUN, default=list(RUN), help="run these alone (default: all)")
    parser.add_argument("--smoke", action="store_true", help="a short run on the CPU that says nothing about speed")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("gpu.py needs a CUDA GPU and found none; --smoke runs it on the CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.sections:
        start = time.perf_counter()
        try:
            said = RUN[name](args.out, args.smoke)
        except Exception as error:  # the other sections still run
            said = f"failed: {error}"
            failed.append(name)
        print(f"[{name}, {time.perf_counter() - start:.0f} s] {said}", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
