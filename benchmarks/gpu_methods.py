"""Training steps of the four methods, a whole concept, and LAG's cost: what benchmarks/gpu.py runs on a card.

Networks have the real shapes and random weights, so no file is needed; without transformers TextBoost is a row that
says so. With smoke=True a small UNet runs on the CPU, to show that every line works; its times mean nothing.
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
from pcs_trainer.unet.layers import LowRank
from pcs_trainer.methods.custom_diffusion import without_first_gradient
from pcs_trainer.methods.dreambooth import PROJECTIONS
from pcs_trainer.unet.unet import UNet
from registry import SD15, SDXL
from torch import Tensor, nn

from pcs_kernels.optim import AdamW8bit, step_in_backward

MODELS = {"sd15 512": (SD15, 64), "sdxl 1024": (SDXL, 128)}
SMALL = {
    "small": (
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        16,
    )
}
METHODS = ("personalized_residuals", "custom_diffusion", "textboost", "dreambooth")
Trained = dict[str, nn.Parameter]  # by the tensor's own name, or the layer's with .down and .up
CAPS = {"dreambooth": 4.6e9, "custom_diffusion": 3.0e9, "personalized_residuals": 2.4e9, "textboost": 2.4e9}  # SD1.5


class Scene:
    """A network on the device with the inputs of a step."""

    def __init__(
        self,
        config: dict[str, Any],
        side: int,
        batch: int,
        device: str,
        dtype: torch.dtype,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.unet = UNet.from_config(config, device="meta" if weights else device)
        if weights:
            self.unet.load_state_dict({name: w.clone() for name, w in weights.items()}, assign=True)
        self.unet.to(dtype).requires_grad_(False)
        width = config["cross_attention_dim"]
        self.x, self.noise = (torch.randn(batch, 4, side, side, device=device, dtype=dtype) for _ in range(2))
        self.t = torch.randint(1000, (batch,), device=device)
        self.text = torch.randn(batch, 77, width, device=device, dtype=dtype)
        self.added = None
        if config.get("addition_embed_type"):
            ids = torch.full((batch, 6), 1024.0, device=device)
            self.added = {"text_embeds": torch.randn(batch, 1280, device=device, dtype=dtype), "time_ids": ids}
        self.encode: Callable[[], Any] = lambda: self.text
        self.trained: Trained = {}
        self.encoder: Any = None  # TextBoost's, and what it reads
        self.ids: Any = None

    def loss(self) -> Tensor:
        return (self.unet(self.x, self.t, self.encode(), self.added).float() - self.noise.float()).square().mean()


def attached(unet: UNet, names: list[str], rank: Callable[[int], int]) -> Trained:
    """A low-rank pair on each of these projections."""
    trained: Trained = {}
    for name in names:
        weight = unet.get_submodule(name).weight
        c_out, c_in = weight.shape[:2]
        r = rank(c_out)
        pair = torch.randn(r, c_in, device=weight.device) * r**-0.5, torch.randn(c_out, r, device=weight.device) * 0.01
        down, up = (nn.Parameter(p) for p in pair)
        unet.attach(name, LowRank(down, up, key="subject"))
        trained |= {f"{name}.down": down, f"{name}.up": up}
    return trained


def residual_pairs(unet: UNet) -> Trained:
    """A pair of rank 0.05 of the width on every proj_out."""
    names = [name for name, _ in unet.named_modules() if name.endswith(".proj_out")]
    return attached(unet, names, lambda width: max(1, width // 20))


def lora_pairs(unet: UNet) -> Trained:
    """A pair of rank 4 on every projection of every attention."""
    return attached(unet, [n for n, _ in unet.named_modules() if n.endswith(PROJECTIONS) and ".attn" in n], lambda _: 4)


def start(scene: Scene, method: str) -> Trained:
    """What the method trains, put on the scene's network; text that stays the same is projected once."""
    unet = scene.unet
    if method == "personalized_residuals":
        trained, kv = residual_pairs(unet), unet.text_kv(scene.text)
        scene.encode = lambda: kv
        return trained
    if method == "dreambooth_lora":
        return lora_pairs(unet)
    if method == "custom_diffusion":
        trained = {n: p for n, p in unet.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n}
        for p in trained.values():
            p.data = p.data.float()
            p.requires_grad_(True)
        scene.encode = lambda: without_first_gradient(unet.text_kv(scene.text))
        return trained
    if method == "dreambooth":
        for p in unet.requires_grad_(True).parameters():
            if p.ndim == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        return dict(unet.named_parameters())
    return text_encoder(scene)


def text_encoder(scene: Scene) -> Trained:
    """CLIP's text encoder of the model's width with rank-4 LoRA on its six projections."""
    from pcs_trainer.methods.textboost import LAYERS
    from pcs_trainer.model.text_adapters import TextLowRank, attach_text
    from transformers import CLIPTextConfig, CLIPTextModel

    width, like = scene.text.shape[-1], scene.text
    size = dict(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12, num_attention_heads=max(1, width // 64)
    )
    encoder = CLIPTextModel(CLIPTextConfig(**size)).to(like).requires_grad_(False).eval()
    trained: Trained = {}
    for number in range(12):
        for layer in LAYERS["v1"]:
            c_in = 4 * width if layer == "mlp.fc2" else width
            c_out = 4 * width if layer == "mlp.fc1" else width
            down, up = (nn.Parameter(torch.randn(*s, device=like.device) * 0.02) for s in ((4, c_in), (c_out, 4)))
            name = f"text_model.encoder.layers.{number}.{layer}"
            attach_text(encoder, name, TextLowRank(down, up))
            trained |= {f"{name}.down": down, f"{name}.up": up}
    scene.ids, scene.encoder = torch.randint(49000, (like.shape[0], 77), device=like.device), encoder
    scene.encode = lambda: encoder(scene.ids).last_hidden_state
    return trained


def stepper(scene: Scene, method: str, graph: bool) -> Callable[[], None]:
    """One training step; with `graph` forward and backward replay one CUDA graph, the optimizer follows."""
    trained = scene.trained = scene.trained or start(scene, method)
    optimizer = AdamW8bit(trained.values(), lr=1e-6)
    if method == "dreambooth" and not graph:
        handle = step_in_backward(optimizer)
        return lambda: handle.backward(scene.loss) and None
    replay = captured(scene, list(trained.values())) if graph else None

    def step() -> None:
        if replay is None:
            scene.loss().backward()
        else:
            replay()
        optimizer.step()
        if replay is None:
            optimizer.zero_grad()

    return step


def captured(scene: Scene, trained: list[nn.Parameter]) -> Callable[[], None]:
    """Forward and backward as one CUDA graph that fills the same gradients every time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            scene.loss().backward()
            for p in trained:
                p.grad = None
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scene.loss().backward()
    return graph.replay


def seconds(step: Callable[[], Any], rounds: int, cuda: bool) -> float:
    step()
    times = []
    for _ in range(rounds):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def methods(out: Path, smoke: bool) -> str:
    """Steps a second and peak memory of each model x method x batch, eager and as a graph."""
    device = "cpu" if smoke else "cuda"
    batches, modes = ((1,), (False,)) if smoke else ((1, 4, 8), (False, True))
    rows = []
    for model, (config, side) in (SMALL if smoke else MODELS).items():
        for method in METHODS:
            for batch in batches:
                for graph in modes:
                    rows.append(one_row(model, config, side, method, batch, graph, device, 2 if smoke else 10))
    save(out / "gpu_methods.json", rows)
    lines = [f"{r['model']:10} {r['method']:23} batch {r['batch']} {r['mode']:6} {r['said']}" for r in rows]
    return "\n" + "\n".join(lines)


def one_row(
    model: str, config: dict[str, Any], side: int, method: str, batch: int, graph: bool, device: str, rounds: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model, "method": method, "batch": batch, "mode": "graph" if graph else "eager"}
    cuda = device == "cuda"
    capped = cuda and model.startswith("sd15") and batch == 1 and not graph
    try:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, CAPS[method] / total) if capped else 1.0)
        scene = Scene(config, side, batch, device, torch.bfloat16 if cuda else torch.float32)
        row["seconds"] = seconds(stepper(scene, method, graph), rounds, cuda)
        row["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
        row["cap_bytes"] = CAPS[method] if capped else None
        peak = "" if not cuda else f", peak {row['peak_bytes'] / 1e9:.2f} GB" + (" under its cap" if capped else "")
        row["said"] = f"{1 / row['seconds']:.1f} it/s{peak}"
    except ImportError as error:
        row["said"] = f"absent: {error}"
    except torch.cuda.OutOfMemoryError:
        row["said"] = f"out of memory{' under its cap' if capped else ''}"
    return row


def concept(out: Path, smoke: bool) -> str:
    """150 steps of Personalized Residuals at batch 4 from cached latents and text."""
    config, side = (SMALL["small"] if smoke else MODELS["sd15 512"])[:2]
    scene = Scene(config, side, 4, "cpu" if smoke else "cuda", torch.float32 if smoke else torch.bfloat16)
    step = stepper(scene, "personalized_residuals", graph=not smoke)
    count = 3 if smoke else 150
    step()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    if not smoke:
        torch.cuda.synchronize()
    took = time.perf_counter() - begin
    save(out / "gpu_concept.json", [{"steps": count, "batch": 4, "seconds": took}])
    return f"{count} steps x 4 in {took:.2f} s"


def lag(out: Path, smoke: bool) -> str:
    """One guided evaluation with LAG's maps and masks over the same with the residual everywhere."""
    config, side = (SMALL["small"] if smoke else MODELS["sd15 512"])[:2]
    scene = Scene(config, side, 2, "cpu" if smoke else "cuda", torch.float32 if smoke else torch.bfloat16)
    residual_pairs(scene.unet)
    kv = scene.unet.text_kv(scene.text)
    tokens = torch.zeros(2, 1, 77, device=scene.x.device)
    tokens[:, :, 5:7] = 1
    kept: list[int] = []

    def masks(block: str, maps: Tensor | None) -> Tensor | None:
        if maps is None:
            return None
        kept.append(maps.nbytes)
        given = maps[1:, 0]
        mask = (given > given.median(dim=-1, keepdim=True).values).to(maps.dtype)
        return mask.expand(2, -1)

    with torch.no_grad():
        found = timing.interleave(
            {
                "merged": lambda: scene.unet(scene.x, scene.t, kv, scene.added),
                "lag": lambda: scene.unet(scene.x, scene.t, kv, scene.added, capture=tokens, masks=masks),
            },
            rounds=3 if smoke else 15,
        )
        kept.clear()
        scene.unet(scene.x, scene.t, kv, scene.added, capture=tokens, masks=masks)
    ratio = statistics.median(found["lag"]) / statistics.median(found["merged"])
    save(out / "gpu_lag.json", [{"over_whole_residual": ratio, "map_bytes": sum(kept)}])
    return f"{ratio:.3f} x the residual everywhere, {sum(kept) / 1e6:.2f} MB of maps"


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({**timing.circumstances(), "rows": rows}, indent=1) + "\n")
