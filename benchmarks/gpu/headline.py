"""What is said first of this project: SDXL's step, a concept in 150 steps, and LAG's cost."""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.gpu.rehearsed import eager_step, graphed_step, measured, model_name, rehearsed
from benchmarks.gpu.row import Absent, Machine, Row

METHOD = "personalized_residuals"


def sdxl(method: str, images: int, graph: bool, machine: Machine) -> dict[str, Any]:
    if machine.smoke:
        raise Absent("SDXL's shapes are for a GPU")
    real = rehearsed(machine, "sdxl", method, images, in_backward=False if graph else None)
    return measured(machine, graphed_step(real) if graph else eager_step(real), images)


def concept(graph: bool, machine: Machine) -> dict[str, Any]:
    """150 steps of Personalized Residuals at batch 4, from cached latents and text."""
    if graph and machine.smoke:
        raise Absent("a CUDA graph needs CUDA")
    count = 2 if machine.smoke else 150
    real = rehearsed(machine, model_name(machine), METHOD, 4, in_backward=False if graph else None)
    step = graphed_step(real) if graph else eager_step(real)
    step()
    timing.finish()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    timing.finish()
    took = time.perf_counter() - begin
    return {"steps": count, "images": 4, "seconds": took, "said": f"{count} steps x 4 in {took:.2f} s"}


def lag(machine: Machine) -> dict[str, Any]:
    """One guided evaluation with LAG's maps and masks over the same with the residual everywhere."""
    real = rehearsed(machine, model_name(machine), METHOD, 2)
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
        found = timing.interleave({"everywhere": everywhere, "lag": masked}, rounds=3 if machine.smoke else 15)
    ratio = statistics.median(found["lag"]) / statistics.median(found["everywhere"])
    said = f"{ratio:.3f} x the residual everywhere, {sum(kept) / 1e6:.2f} MB of maps"
    return {"over_whole_residual": ratio, "map_bytes": sum(kept), "said": said}


def rows(smoke: bool) -> list[Row]:
    found = [Row("LAG", lag)]
    found += [Row(f"concept, {'graph' if g else 'eager'}", functools.partial(concept, g)) for g in (True, False)]
    for method, images, graph in ((METHOD, 1, False), (METHOD, 4, False), (METHOD, 1, True), ("dreambooth", 2, False)):
        name = f"sdxl {method}, {images} images, {'graph' if graph else 'eager'}"
        found.append(Row(name, functools.partial(sdxl, method, images, graph)))
    return found
