"""Host time of a training step, without a GPU: python benchmarks/host_time.py

At batch 1 a fast card waits for Python. What Python costs needs no card: the real number of layers with tiny widths,
one thread, process time, Triton's real JIT for sm_86 and a driver whose launcher does nothing; torch's own operations
run on CPU tensors of a few thousand float32 elements (bfloat16 would add oneDNN's conversions), so that their host
part is most of the time. Ours is Personalized Residuals' step on the implementations that a GPU gets; the peer is
diffusers' UNet with as many layers, frozen, with the gradient of its input. The two take turns in one process. On a
card every launch, ours and torch's, also costs its driver call.

Takes about a minute, and two more where Triton's cache is empty. Adds rows to benchmarks/results/host_time.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import timing
import torch
import torch.nn.functional as F
from pcs_trainer.unet import blocks
from pcs_trainer.unet.layers import LowRank
from pcs_trainer.unet.unet import UNet
from registry import SD15, SDXL
from torch import Tensor
from triton.backends.compiler import GPUTarget

import pcs_kernels
from pcs_kernels import _dispatch, _launch
from pcs_kernels.ops.frozen_conv import op as frozen_conv_op
from pcs_kernels.ops.self_attention import op as self_attention_op
from tests.ptx.launcher import ops_on

RESULTS = timing.RESULTS / "host_time.csv"
ARCHITECTURE = 86
SIDE, TOKENS, WIDTH = 8, 7, 32  # of the latents, the text, the first level
TINY = {"cross_attention_dim": WIDTH, "norm_num_groups": 8, "attention_head_dim": 4}
MODELS: dict[str, dict[str, Any]] = {
    "SD1.5": SD15 | TINY | {"block_out_channels": [WIDTH, 2 * WIDTH, 2 * WIDTH, 2 * WIDTH]},
    "SDXL": SDXL
    | TINY
    | {
        "block_out_channels": [WIDTH, 2 * WIDTH, 2 * WIDTH],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
    },
}
RANKS = {WIDTH: 16, 2 * WIDTH: 32}  # 5 % of the real widths, 320 and 640 up: the kernels are others above 16


class NoCard:
    """What Triton's runtime asks of a driver, with a launcher that does nothing."""

    def __init__(self) -> None:
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: GPUTarget("cuda", ARCHITECTURE, 32)
        self.launcher_cls = lambda source, metadata: lambda *launch: None
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (None, 0, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": _launch.SHARED_LIMIT[ARCHITECTURE]},
        )


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, CPU tensors take the way of a GPU's: the same implementations, and no shortcut that is the CPU's."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(ops_on(ARCHITECTURE, NoCard()))
        for op in _dispatch.OPS.values():
            stack.enter_context(mock.patch.dict(op.order, {"cpu": op.order["cuda"]}))
        stack.enter_context(mock.patch.object(self_attention_op, "backend_of", lambda *_: "sdpa"))
        stack.enter_context(mock.patch.object(frozen_conv_op, "_torch_alone", lambda x: isinstance(x, Tensor)))
        stack.enter_context(mock.patch.object(blocks, "trained", lambda _: True))  # Resample: the CPU's phase kernels
        yield


class Step(NamedTuple):
    """One network's step in two parts."""

    forward: Callable[[], Tensor]
    start: Callable[[], None]  # clears the gradients of the step before


def steps(config: dict[str, Any]) -> dict[str, Step]:
    """Ours and diffusers' on the same inputs."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet.from_config(config).requires_grad_(False)
    theirs: Any = UNet2DConditionModel  # diffusers' classes are untyped
    peer = theirs(**config).requires_grad_(False)
    residuals = []
    for name, layer in unet.named_modules():
        if name.endswith(".proj_out"):
            width = layer.weight.shape[0]
            down, up = torch.randn(RANKS[width], width), torch.randn(width, RANKS[width])
            residuals.append(unet.attach(name, LowRank(down.requires_grad_(), up.requires_grad_())))
    x = torch.randn(1, 4, SIDE, SIDE)
    noisy = x.clone().requires_grad_()
    t, text = torch.tensor([400]), torch.randn(1, TOKENS, WIDTH)
    added: dict[str, Tensor] | None = None
    if config.get("addition_embed_type"):
        added = {"text_embeds": torch.randn(1, 20), "time_ids": torch.ones(1, 6)}

    def clear() -> None:
        noisy.grad = None
        for r in residuals:
            r.down.grad = r.up.grad = None

    def ours() -> Tensor:
        y = unet(x, t, text, added)
        assert isinstance(y, Tensor)
        return y

    return {
        "ours": Step(ours, clear),
        "diffusers": Step(lambda: peer(noisy, t, text, added_cond_kwargs=added).sample, clear),
    }


def seconds(step: Step) -> tuple[float, float]:
    """Process time of a forward and its backward."""
    step.start()
    begin = time.process_time()
    y = step.forward()
    middle = time.process_time()
    y.backward(y.detach())
    return middle - begin, time.process_time() - middle


def whole_steps(rounds: int) -> list[dict[str, object]]:
    """A row for each model and network: milliseconds, medians of the rounds."""
    rows: list[dict[str, object]] = []
    for model, config in MODELS.items():
        both = steps(config)
        for step in both.values():
            seconds(step)
            seconds(step)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in both}
        for _ in range(rounds):
            for name, step in both.items():
                taken[name].append(seconds(step))
        sums = {name: [sum(t) for t in times] for name, times in taken.items()}
        for name, times in taken.items():
            forward, backward = (1000 * statistics.median(part) for part in zip(*times, strict=True))
            total = 1000 * statistics.median(sums[name])
            ratio = timing.ratio(sums[name], sums["diffusers"])[0]
            row = {"case": model, "variant": name, "forward_ms": f"{forward:.1f}", "backward_ms": f"{backward:.1f}"}
            rows.append(row | {"sum_ms": f"{total:.1f}", "ratio": f"{ratio:.2f}"})
            print(f"{model:16} {name:10} {forward:7.1f} + {backward:7.1f} = {total:7.1f} ms {ratio:6.2f}")
    return rows


Pair = tuple[Callable[[], Any], Callable[[], Any]]


def single_ops() -> dict[str, Pair]:
    """Each op beside torch's chain of operations for the same values."""
    torch.manual_seed(0)

    def new(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(shape).requires_grad_(grad)

    c = 2 * WIDTH
    gates = new(1, 64, 2 * c, grad=True)
    image = new(1, c, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias, matrix = new(c), new(c), new(c, c)
    q, k = new(1, 64, 4, 16).transpose(1, 2).requires_grad_(), new(1, TOKENS, 4, 16).transpose(1, 2)
    x, down, up = new(1, 64, c, grad=True), new(16, c, grad=True), new(c, 16, grad=True)

    def gated() -> Tensor:
        value, gate = gates.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def residual() -> Tensor:
        return F.linear(x, matrix, bias) + F.linear(F.linear(x, down), up)

    return {
        "geglu": (lambda: pcs_kernels.geglu(gates), gated),
        "group_norm_silu": (
            lambda: pcs_kernels.group_norm_silu(image, 8, weight, bias),
            lambda: F.silu(F.group_norm(image, 8, weight, bias)),
        ),
        "cross_attention": (
            lambda: pcs_kernels.cross_attention(q, k, k)[0],
            lambda: F.scaled_dot_product_attention(q, k, k),
        ),
        "lowrank_residual": (lambda: pcs_kernels.lowrank_residual(x, matrix, bias, down, up), residual),
        "frozen_linear": (lambda: pcs_kernels.frozen_linear(x, matrix, bias), lambda: F.linear(x, matrix, bias)),
    }


def op_times(rounds: int, repeats: int = 50) -> list[dict[str, object]]:
    """A row for each op and side: microseconds of a forward, and of a backward."""
    rows: list[dict[str, object]] = []
    for op, pair in single_ops().items():
        taken: dict[str, list[tuple[float, float]]] = {"ours": [], "torch": []}
        for call in pair:
            call().backward(torch.ones_like(call()))
        for _ in range(rounds):
            for name, call in zip(taken, pair, strict=True):
                taken[name].append(_of_one(call, repeats))
        for name, times in taken.items():
            forward, backward = (1e6 * statistics.median(part) for part in zip(*times, strict=True))
            rows.append({"case": op, "variant": name, "forward_us": f"{forward:.0f}", "backward_us": f"{backward:.0f}"})
            print(f"{op:16} {name:10} {forward:7.0f} + {backward:7.0f} us")
    return rows


def _of_one(call: Callable[[], Tensor], repeats: int) -> tuple[float, float]:
    begin = time.process_time()
    results = [call() for _ in range(repeats)]
    middle = time.process_time()
    given = torch.ones_like(results[0])
    start = time.process_time()
    for y in results:
        y.backward(given)
    return (middle - begin) / repeats, (time.process_time() - start) / repeats


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="times that the variants take turns")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--no-ops", action="store_true", help="whole steps only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results file")
    return parser.parse_args(argv)


def main() -> None:
    args = parsed()
    torch.set_num_threads(1)
    for model in set(MODELS) - set(args.models):
        del MODELS[model]
    with as_on_a_gpu():
        rows = whole_steps(args.rounds)
        if not args.no_ops:
            rows += op_times(args.rounds)
    timing.append(args.out, [row | timing.circumstances() for row in rows])


if __name__ == "__main__":
    main()
