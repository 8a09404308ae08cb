"""Training steps of every method, a whole concept, and LAG's cost: what benchmarks/gpu.py runs on a card.

A method's own setup works on networks of the real shapes with random weights, so no file is needed; a method that
trains text needs transformers, and without it is a row that says so. With smoke=True a small UNet runs on the CPU, to
show that every line works; its times mean nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
from pcs_trainer.memory.networks import networks_of
from pcs_trainer.memory.rehearsal import Rehearsal
from pcs_trainer.methods import TITLES, settings_for
from registry import SD15, SDXL
from torch import Tensor

MODELS: dict[str, tuple[dict[str, Any], int]] = {"sd15 512": (SD15, 64), "sdxl 1024": (SDXL, 128)}
SMALL_UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL: dict[str, tuple[dict[str, Any], int]] = {"small": ({"unet": SMALL_UNET, "text_encoder": SMALL_TEXT}, 16)}
METHODS = tuple(TITLES)
NOT_MEASURED: dict[str, str] = {}
# Bytes that SD1.5's step of one image must do with, where a goal is set.
CAPS = {"dreambooth": 4.6e9, "custom_diffusion": 3.0e9, "personalized_residuals": 2.4e9, "textboost": 2.4e9}


def rehearsed(
    model: tuple[dict[str, Any], int], method: str, batch: int, smoke: bool, graph: bool = False
) -> Rehearsal:
    """The method's step on `batch` images; a CUDA graph cannot hold an optimizer step in the backward pass."""
    config, side = model
    settings = settings_for(None, method, **({"step_in_backward": False} if graph else {}))
    device, dtype = ("cpu", torch.float32) if smoke else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    found = Rehearsal(networks_of(config), settings, (batch, side), dtype, device, counted=False)
    found.unet.set_plan(settings.plan)
    return found


def stepper(real: Rehearsal, graph: bool) -> Callable[[], object]:
    """One training step; with `graph`, forward and backward replay one CUDA graph and the optimizer follows."""
    if not graph:
        return real.step
    replay, optimizer = captured(real), real.optimizer
    assert optimizer is not None

    def step() -> None:
        replay()
        optimizer.step()

    return step


def captured(real: Rehearsal) -> Callable[[], object]:
    """Forward and backward as one CUDA graph that fills the same gradients every time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            real.loss().backward()
            for p in real.trained:
                p.grad = None
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        real.loss().backward()
    return graph.replay


def seconds(step: Callable[[], object], rounds: int) -> float:
    """Median of `rounds` calls, after one that warms up."""
    step()
    times = []
    for _ in range(rounds):
        timing.finish()
        begin = time.perf_counter()
        step()
        timing.finish()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def methods(out: Path, smoke: bool) -> str:
    """Steps per second and peak memory of each model, method and batch, eager and as a graph."""
    batches, modes = ((1,), (False,)) if smoke else ((1, 4, 8), (False, True))
    rows = [
        one_row(model, method, batch, graph, smoke)
        for model in (SMALL if smoke else MODELS)
        for method in METHODS
        for batch in batches
        for graph in modes
    ]
    save(out / "gpu_methods.json", rows)
    lines = [f"{r['model']:10} {r['method']:23} batch {r['batch']} {r['mode']:6} {r['said']}" for r in rows]
    return "\n" + "\n".join(lines)


def one_row(model: str, method: str, batch: int, graph: bool, smoke: bool) -> dict[str, Any]:
    """One case; where it cannot run, the row says why."""
    row: dict[str, Any] = {"model": model, "method": method, "batch": batch, "mode": "graph" if graph else "eager"}
    cap = CAPS.get(method) if model.startswith("sd15") and batch == 1 and not graph and not smoke else None
    under = " under its cap" if cap else ""
    try:
        if not smoke:
            limit_memory(cap)
        real = rehearsed((SMALL | MODELS)[model], method, batch, smoke, graph)
        row["seconds"] = seconds(stepper(real, graph), 2 if smoke else 10)
        row["peak_bytes"] = None if smoke else torch.cuda.max_memory_allocated()
        row["cap_bytes"] = cap
        peak = "" if smoke else f", peak {row['peak_bytes'] / 1e9:.2f} GB{under}"
        row["said"] = f"{1 / row['seconds']:.1f} it/s{peak}"
    except ImportError as error:
        row["said"] = f"not available: {error}"
    except torch.cuda.OutOfMemoryError:
        row["said"] = f"out of memory{under}"
    return row


def limit_memory(cap: float | None) -> None:
    """Start the peak anew, and let torch's allocator have `cap` bytes, or all."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total) if cap else 1.0)


def concept(out: Path, smoke: bool) -> str:
    """150 steps of Personalized Residuals at batch 4 from cached latents and text."""
    model, count = (SMALL["small"], 3) if smoke else (MODELS["sd15 512"], 150)
    graph = not smoke
    step = stepper(rehearsed(model, "personalized_residuals", 4, smoke, graph), graph)
    step()
    timing.finish()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    timing.finish()
    took = time.perf_counter() - begin
    save(out / "gpu_concept.json", [{"steps": count, "batch": 4, "seconds": took}])
    return f"{count} steps x 4 in {took:.2f} s"


def lag(out: Path, smoke: bool) -> str:
    """One guided evaluation with LAG's maps and masks over the same with the residual everywhere."""
    real = rehearsed(SMALL["small"] if smoke else MODELS["sd15 512"], "personalized_residuals", 2, smoke)
    unet, kv = real.unet, real.cached
    x = torch.randn(2, real.channels, real.latent, real.latent, device=real.device, dtype=real.dtype)
    t = torch.randint(1000, (2,), device=real.device)
    tokens = torch.zeros(2, 1, real.tokens, device=real.device)
    tokens[:, :, 5:7] = 1
    kept: list[int] = []

    def masks(_block: str, maps: Tensor | None) -> Tensor | None:
        if maps is None:
            return None
        kept.append(maps.nbytes)
        given = maps[1:, 0]
        mask = (given > given.median(dim=-1, keepdim=True).values).to(maps.dtype)
        return mask.expand(2, -1)

    def everywhere() -> object:
        return unet(x, t, kv)

    def masked() -> object:
        kept.clear()
        return unet(x, t, kv, capture=tokens, masks=masks)

    with torch.no_grad():
        found = timing.interleave({"everywhere": everywhere, "lag": masked}, rounds=3 if smoke else 15)
    ratio = statistics.median(found["lag"]) / statistics.median(found["everywhere"])
    save(out / "gpu_lag.json", [{"over_whole_residual": ratio, "map_bytes": sum(kept)}])
    return f"{ratio:.3f} x the residual everywhere, {sum(kept) / 1e6:.2f} MB of maps"


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows of one section with the machine they are of."""
    path.write_text(json.dumps({**timing.circumstances(), "rows": rows}, indent=1) + "\n")
