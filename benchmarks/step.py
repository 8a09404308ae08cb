"""One Personalized-Residuals training step of SD1.5 on this CPU, against diffusers' UNet and the machine's own speed.

    python benchmarks/step.py --size 512 --rounds 3

Forward and backward at batch 1 with random weights; a low-rank pair on every `proj_out` trains. Peers are diffusers'
UNet in float32, bfloat16, bfloat16 channels-last and that compiled. Every variant's gradients are first checked against
float32; then the steps are interleaved in one process, each between two measurements of the machine's bf16 matmul rate.

Takes about three minutes at 512 on two cores, and several more with torch.compile. Adds a row for each variant to
benchmarks/results/step.csv: median, spread, and the share of the measured matmul rate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import timing
import torch
from pcs_trainer.unet.layers import LowRank
from pcs_trainer.unet.unet import UNet
from registry import SD15
from torch import nn

TERAFLOP = {256: 0.373, 512: 1.80}  # of one frozen step by size, counted from the layer shapes
RESULTS = timing.RESULTS / "step.csv"
PLANS = ("eager", "A", "B", "C")
Step = Callable[[], list[torch.Tensor]]
Weights = dict[str, torch.Tensor]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by layer: down, up
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class PeerResidual(nn.Module):
    """diffusers' projection with a low-rank residual beside it, as LoRA layers for it are written."""

    def __init__(self, base: nn.Conv2d, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(down.to(base.weight.dtype, copy=True)[..., None, None])
        self.up = nn.Parameter(up.to(base.weight.dtype, copy=True)[..., None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + nn.functional.conv2d(nn.functional.conv2d(x, self.down), self.up)


def random_weights() -> Weights:
    """SD1.5-shaped bfloat16 weights that keep activations of ordinary size."""
    generator = torch.Generator().manual_seed(0)
    weights: Weights = {}
    for name, p in UNet.from_config(SD15, device="meta").state_dict().items():
        scale = 0.02 if p.dim() == 1 else 0.7 * p[0].numel() ** -0.5
        weights[name] = torch.empty(p.shape, dtype=torch.bfloat16).normal_(0, scale, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1
    return weights


def residuals(weights: Weights) -> Pairs:
    """Name of each proj_out -> float32 down, up of rank 0.05 x width."""
    pairs: Pairs = {}
    for name, w in weights.items():
        if name.endswith("proj_out.weight"):
            width, rank = w.shape[0], w.shape[0] // 20
            pairs[name.removesuffix(".weight")] = (
                torch.randn(rank, width) * rank**-0.5,
                torch.randn(width, rank) * 0.02,
            )
    return pairs


def inputs(size: int) -> Inputs:
    """(noisy latents, text states, noise)"""
    return torch.randn(1, 4, size // 8, size // 8), torch.randn(1, 77, 768), torch.randn(1, 4, size // 8, size // 8)


def training_step(forward: Callable[[], torch.Tensor], noise: torch.Tensor, trained: list[torch.Tensor]) -> Step:
    def step() -> list[torch.Tensor]:
        loss = (forward().float() - noise).square().mean()
        return list(torch.autograd.grad(loss, trained))

    return step


def ours(weights: Weights, pairs: Pairs, call: Inputs) -> dict[str, Step]:
    """One network, and a step for each memory plan."""
    unet = UNet.from_config(SD15, device="meta")
    unet.load_state_dict({name: w.clone() for name, w in weights.items()}, assign=True)
    unet.requires_grad_(False)
    trained: list[torch.Tensor] = []
    for name, (down, up) in pairs.items():
        pair = down.clone().requires_grad_(), up.clone().requires_grad_()
        unet.attach(name, LowRank(*pair))
        trained += pair
    x, text, noise = call
    kv = unet.text_kv(text.bfloat16())  # the text is frozen: its keys and values are computed once a run

    def forward(plan: str) -> torch.Tensor:
        return unet.set_plan(plan)(x.bfloat16(), 500, kv)

    return {f"pcs plan {plan}": training_step(lambda plan=plan: forward(plan), noise, trained) for plan in PLANS}


def peer(
    weights: Weights, pairs: Pairs, call: Inputs, dtype: torch.dtype, channels_last: bool, compiled: bool
) -> dict[str, Step]:
    """diffusers' UNet with the same residuals, and that compiled."""
    from diffusers import UNet2DConditionModel

    theirs: Any = UNet2DConditionModel  # diffusers' classes are untyped
    with torch.device("meta"):
        unet = theirs(**SD15)
    unet.load_state_dict({name: w.to(dtype, copy=True) for name, w in weights.items()}, assign=True)
    unet.requires_grad_(False)
    trained: list[torch.Tensor] = []
    for name, (down, up) in pairs.items():
        parent, _, leaf = name.rpartition(".")
        layer = PeerResidual(unet.get_submodule(name), down, up)
        setattr(unet.get_submodule(parent), leaf, layer)
        trained += [layer.down, layer.up]
    x, text, noise = call
    x, text = x.to(dtype), text.to(dtype)
    name = "diffusers fp32" if dtype is torch.float32 else "diffusers bf16"
    if channels_last:
        name += " channels_last"
        unet, x = unet.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    steps = {name: training_step(lambda: unet(x, 500, text).sample, noise, trained)}
    if compiled:
        faster = torch.compile(unet)
        steps[name + " compiled"] = training_step(lambda: faster(x, 500, text).sample, noise, trained)
    return steps


def machine_rate() -> float:
    """TFLOP/s of torch's own bfloat16 matmul, the best of a few large shapes."""
    best = 0.0
    for m, k, n in ((2048, 2048, 2048), (4096, 1280, 1280), (4096, 640, 5120)):
        a, b = torch.ones(m, k, dtype=torch.bfloat16), torch.ones(n, k, dtype=torch.bfloat16)
        for _ in range(3):
            start = time.perf_counter()
            nn.functional.linear(a, b)
            best = max(best, 2e-12 * m * k * n / (time.perf_counter() - start))
    return best


def check_gradients(steps: dict[str, Step]) -> None:
    """Check gradients against float32: the error of ours may be at most twice that of the bfloat16 peer.

    A peer with a larger error is timed all the same, and marked as wrong.
    """

    def flat(step: Step) -> torch.Tensor:
        return torch.cat([g.flatten().double() for g in step()])

    exact = flat(steps["diffusers fp32"])
    error = {name: ((flat(step) - exact).norm() / exact.norm()).item() for name, step in steps.items()}
    for name, e in error.items():
        wrong = e > 2 * max(error["diffusers bf16"], 1e-3)
        print(f"  gradients against float32: {name:40} {e:.2e}{'  wrong' if wrong else ''}", flush=True)
        if wrong and name.startswith("pcs"):
            raise SystemExit(f"{name}: the gradients are wrong (relative error {e:.2e}), so nothing is timed")


def measure(steps: dict[str, Step], rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    rates = [machine_rate()]
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
            rates.append(machine_rate())
    return seconds, rates


def rows(size: int, seconds: dict[str, list[float]], rates: list[float]) -> list[dict[str, object]]:
    facts = timing.circumstances()
    machine = statistics.median(rates)
    made: list[dict[str, object]] = []
    for name, times in seconds.items():
        median = statistics.median(times)
        speed = TERAFLOP[size] / median
        over, low, high = timing.ratio(times, seconds["pcs plan A"])
        made.append(
            {
                **facts,
                "size": size,
                "variant": name,
                "rounds": len(times),
                "seconds": f"{median:.3f}",
                "fastest": f"{min(times):.3f}",
                "slowest": f"{max(times):.3f}",
                "ours_is_faster": f"{over:.2f}",
                "quartile_low": f"{low:.2f}",
                "quartile_high": f"{high:.2f}",
                "teraflop_per_second": f"{speed:.3f}",
                "machine_teraflop_per_second": f"{machine:.3f}",
                "share_of_machine": f"{speed / machine:.2f}",
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=sorted(TERAFLOP), default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--dry", action="store_true", help="print, but add nothing to the results")
    options = parser.parse_args()
    torch.manual_seed(0)
    weights = random_weights()
    pairs, call = residuals(weights), inputs(options.size)
    steps = ours(weights, pairs, call)
    steps |= peer(weights, pairs, call, torch.float32, channels_last=False, compiled=False)
    steps |= peer(weights, pairs, call, torch.bfloat16, channels_last=False, compiled=False)
    steps |= peer(weights, pairs, call, torch.bfloat16, channels_last=True, compiled=not options.no_compile)
    del weights
    check_gradients(steps)
    seconds, rates = measure(steps, options.rounds)
    table = rows(options.size, seconds, rates)
    size, threads, middle = options.size, torch.get_num_threads(), statistics.median(rates)
    print(f"{timing.circumstances()['device']}, {threads} threads, torch {torch.__version__}, {size} x {size}")
    print(f"bf16 matmul rate here: {min(rates):.3f} - {max(rates):.3f} TFLOP/s, median {middle:.3f}")
    for row in table:
        spread, share = f"({row['fastest']} - {row['slowest']})", float(str(row["share_of_machine"]))
        took = f"{row['variant']:40} {row['seconds']} s {spread}"
        print(f"  {took}  {row['ours_is_faster']} x ours  {share:.0%} of the matmul rate")
    if not options.dry:
        timing.append(RESULTS, table)


if __name__ == "__main__":
    main()
