"""Real steps on networks of the models' true shapes with random weights, and how they are timed.

The weights are made on the device in the training dtype, so that no step begins with a second, larger copy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import timing
from benchmarks.gpu.graphs import record
from benchmarks.gpu.row import Machine, peak_bytes
from benchmarks.registry import SD15, SDXL
from pcs_trainer.memory.networks import networks_of
from pcs_trainer.memory.rehearsal import Rehearsal
from pcs_trainer.methods import settings_for

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
# name -> (configuration, pixels a side)
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "sd15": (SD15, 512),
    "sdxl": (SDXL, 1024),
    "small": ({"unet": SMALL_UNET, "text_encoder": SMALL_TEXT}, 128),
}


def model_name(machine: Machine, wanted: str = "sd15") -> str:
    """The model to measure; on the CPU the small one."""
    return "small" if machine.smoke else wanted


def rehearsed(
    machine: Machine,
    model: str,
    method: str,
    images: int,
    assignment: Mapping[str, str] | str | None = None,
    in_backward: bool | None = None,
) -> Rehearsal:
    """The method's step on `images` pictures in one forward, with the memory plan of each layer.

    As in the trainer, a network that trains whole has its convolution weights channels-last.
    """
    config, pixels = MODELS[model]
    networks = networks_of(config)
    settings = settings_for(None, method, **({} if in_backward is None else {"step_in_backward": in_backward}))
    dtype = torch.float32 if machine.smoke else torch.bfloat16
    torch.manual_seed(0)
    size = images, pixels // networks.pixels
    real = Rehearsal(networks, settings, size, dtype, machine.device, counted=False)
    if real.learner.trains_whole_network:
        channels_last(real)
    plan = settings.plan if assignment is None else assignment
    real.unet.set_plan(dict(plan) if isinstance(plan, Mapping) else plan)
    return real


def channels_last(real: Rehearsal) -> None:
    """Convolution weights in the layout in which the UNet's activations are."""
    for parameter in real.unet.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def eager_step(real: Rehearsal) -> Callable[[], object]:
    """The step as the method takes it."""
    return real.step


def graphed_step(real: Rehearsal) -> Callable[[], object]:
    """Forward and backward from one CUDA graph, the optimizer's step behind it.

    A method whose step lies in the backward is another one here: all its gradients are alive at once.
    """
    optimizer = real.optimizer
    if real.handle is not None or optimizer is None:
        raise ValueError("a graphed step has its optimizer behind it; rehearse with in_backward=False")

    def run() -> torch.Tensor:
        for p in real.trained:
            p.grad = None
        loss = real.loss()
        loss.backward()
        return loss

    replay, _ = record(run)

    def step() -> None:
        replay()
        optimizer.step()

    return step


def seconds(step: Callable[[], object], rounds: int) -> float:
    """Median of `rounds` calls, after two that warm up."""
    for _ in range(2):
        step()
    times = []
    for _ in range(rounds):
        timing.finish()
        begin = time.perf_counter()
        step()
        timing.finish()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measured(machine: Machine, step: Callable[[], object], images: int) -> dict[str, Any]:
    """Seconds a step and the peak since the row began, building the networks included."""
    took = seconds(step, 2 if machine.smoke else 10)
    peak = peak_bytes()
    held = "" if peak is None else f", peak {peak / 1e9:.3f} GB"
    return {"seconds": took, "images": images, "peak_bytes": peak, "said": f"{1 / took:.2f} it/s{held}"}
