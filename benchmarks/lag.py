"""The cost of LAG: a guided sampling step of SD1.5 with LAG, against one with the concept merged into the weights.

    python benchmarks/lag.py --size 512 --rounds 5

Random bfloat16 weights of the real shapes, a low-rank residual of 0.05 x width on every proj_out, classifier-free
guidance (a batch of two). For comparison, LAG as attention-map tools do it: the probabilities of all tokens are written
out, averaged over the heads and kept. The variants take turns in one process; a ratio is taken round by round over the
merged step.

Takes about two minutes at 512 on two cores. Adds a row for each variant to benchmarks/results/lag.csv.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
from registry import SD15
from step import random_weights, residuals
from torch import Tensor, nn

from pcs_trainer.unet import blocks
from pcs_trainer.sampling.lag import Attention, Lag, masked_blocks
from pcs_trainer.unet.layers import Conv2d, LowRank
from pcs_trainer.sampling.predictor import Predictor
from pcs_trainer.model.text import Text
from pcs_trainer.unet.unet import UNet

RESULTS = timing.RESULTS / "lag.csv"
CHECKED_AT = 128  # pixels: the size at which the variants are compared with each other before any is timed
PLACES = [5, 6]  # of the subject's tokens in the prompt
MOST_TIME, MOST_BYTES = 1.03, 2_000_000  # LAG's targets: time over the merged step, bytes of maps
Step = Callable[[], Tensor]


class Bench:
    """One network whose proj_out layers are swapped: merged ones, or plain ones with residuals."""

    def __init__(self, size: int) -> None:
        torch.manual_seed(0)
        weights = random_weights()
        pairs = residuals(weights)
        self.unet = UNet.from_config(SD15, device="meta")
        self.unet.load_state_dict(weights, assign=True)
        self.unet.requires_grad_(False)
        self.merged: dict[str, nn.Module] = {}
        self.plain: dict[str, nn.Module] = {}
        for name, (down, up) in pairs.items():
            layer: Any = self.unet.get_submodule(name)
            joined = Conv2d(layer.in_channels, layer.out_channels, 1).requires_grad_(False)
            new = layer.weight.float() + (up @ down).reshape(layer.weight.shape)
            joined.weight, joined.bias = nn.Parameter(new.bfloat16(), requires_grad=False), layer.bias
            self.unet.attach(name, LowRank(down, up, key="subject"))
            self.merged[name], self.plain[name] = joined, layer
        self.blocks = masked_blocks(self.unet, ["subject"])
        self.text = Text(torch.randn(2, 77, 768).bfloat16(), None, [])
        self.at(size)

    def at(self, size: int) -> None:
        """Set the size, in pixels, of the steps made from now on."""
        self.pixels, self.latents = (size, size), (size // 8, size // 8)
        self.x = torch.randn(1, 4, *self.latents)

    def put(self, layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.unet.get_submodule(parent), leaf, layer)

    def predictor(self, lag: Lag | None, tokens: int = 0) -> Predictor:
        groups = (lag is not None) + tokens
        if not groups:
            return Predictor(self.unet, self.text, self.pixels, 7.5, 1, Attention(), range(1), self.latents)
        weights = torch.zeros(1, groups, 77)
        weights[0, 0, PLACES] = 1
        weights[0, 1:, 7] = 1
        names = [f"word {i}" for i in range(tokens)]
        attention = Attention(weights, None if tokens else self.blocks, lag, ["subject"] * (lag is not None), names)
        return Predictor(self.unet, self.text, self.pixels, 7.5, 1, attention, range(1), self.latents)

    def step(self, layers: dict[str, nn.Module], predict: Predictor) -> Step:
        x = self.x

        @torch.no_grad()
        def call() -> Tensor:
            self.put(layers)
            predict.step = 0
            return predict(x, 500.0)

        return call

    def materialised(self, layers: dict[str, nn.Module], predict: Predictor, kept: list[Tensor]) -> Step:
        """The same step with every token's attention probabilities written out, and kept averaged over the heads."""
        fused, plain = blocks.cross_attention, self.step(layers, predict)

        def attention(
            q: Tensor, k: Tensor, v: Tensor, capture: Tensor | None = None, scale: float | None = None
        ) -> tuple[Tensor, Tensor | None]:
            p = (q @ k.transpose(-1, -2)).float().mul_(scale or q.shape[-1] ** -0.5).softmax(-1)
            kept.append(p.mean(1))
            out = (p.to(q.dtype) @ v).transpose(1, 2).contiguous().transpose(1, 2)
            return out, None if capture is None else capture @ kept[-1].transpose(1, 2)

        def call() -> Tensor:
            kept.clear()
            blocks.cross_attention = attention
            try:
                return plain()
            finally:
                blocks.cross_attention = fused

        return call


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def captured_bytes(bench: Bench, predict: Predictor) -> int:
    """Bytes of the maps that one forward pass returns beside the prediction."""
    bench.put(bench.plain)
    both = torch.cat([bench.x, bench.x]).bfloat16()
    maps = bench.unet(both, 500.0, predict.kv, capture=predict.capture, masks=predict.masker)[1]
    return sum(m.numel() * m.element_size() for m in maps.values())


def variants(bench: Bench, kept: list[Tensor]) -> dict[str, Step]:
    """The steps at the bench's size; `kept` receives the written-out probabilities."""
    plain, lag, shown = bench.predictor(None), bench.predictor(Lag()), bench.predictor(Lag(), tokens=2)
    return {
        "merged": bench.step(bench.merged, plain),
        "residuals": bench.step(bench.plain, plain),
        "LAG": bench.step(bench.plain, lag),
        "LAG, and two words' maps returned": bench.step(bench.plain, shown),
        "LAG by written-out probabilities": bench.materialised(bench.plain, lag, kept),
    }


def check(steps: dict[str, Step]) -> None:
    """Two ways to the same prediction must be much closer to each other than LAG is to the merged concept."""
    says = {name: step() for name, step in steps.items()}
    masked = relative(says["LAG"], says["merged"])
    print(f"  LAG against merged: {masked:.1e}", flush=True)
    for name, other in (
        ("residuals", "merged"),
        ("LAG by written-out probabilities", "LAG"),
        ("LAG, and two words' maps returned", "LAG"),
    ):
        found = relative(says[name], says[other])
        print(f"  {name} against {other}: {found:.1e}", flush=True)
        if not found < 0.4 * masked:
            raise SystemExit(f"{name} differs from {other} by {found:.1e}, so nothing is timed")


def rows(size: int, seconds: dict[str, list[float]], bytes_of: dict[str, int]) -> list[dict[str, object]]:
    made: list[dict[str, object]] = []
    for name, times in seconds.items():
        middle, low, high = timing.ratio(times, seconds["merged"])
        made.append(
            {
                **timing.circumstances(),
                "size": size,
                "batch": 2,
                "variant": name,
                "rounds": len(times),
                "seconds": f"{statistics.median(times):.4f}",
                "fastest": f"{min(times):.4f}",
                "slowest": f"{max(times):.4f}",
                "over_merged": f"{middle:.4f}",
                "lower_quartile": f"{low:.4f}",
                "upper_quartile": f"{high:.4f}",
                "map_bytes": bytes_of.get(name, 0),
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="time these variants beside the merged one (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    bench = Bench(CHECKED_AT)
    check(variants(bench, []))
    bench.at(options.size)
    kept: list[Tensor] = []
    steps = variants(bench, kept)
    chosen = {n: s for n, s in steps.items() if not options.only or n == "merged" or n in options.only}
    seconds = timing.interleave(chosen, options.rounds)
    bytes_of = {"LAG": captured_bytes(bench, bench.predictor(Lag()))}
    bytes_of["LAG by written-out probabilities"] = sum(m.numel() * m.element_size() for m in kept)
    table = rows(options.size, seconds, bytes_of)
    for row in table:
        took = f"{row['seconds']} s ({row['fastest']} - {row['slowest']})"
        ratio = f"x {row['over_merged']} ({row['lower_quartile']} - {row['upper_quartile']})"
        print(f"  {row['variant']:36} {took}  {ratio}  {row['map_bytes']} bytes of maps")
    timing.append(options.out, table)
    if "LAG" in seconds:
        over = timing.ratio(seconds["LAG"], seconds["merged"])[0]
        if over > MOST_TIME or bytes_of["LAG"] > MOST_BYTES:
            raise SystemExit(f"LAG may take at most {MOST_TIME} x the time of the merged step, and {MOST_BYTES} bytes")


if __name__ == "__main__":
    main()
