"""Full training steps of the methods on SD1.5's shapes, compared with diffusers: python benchmarks/step_methods.py

Forward, backward and optimizer at batch 1, or 1 + 1 class image where the method has a prior loss. Ours is the method's
own setup; the peers hold the same weights and do what diffusers' training scripts do: PEFT's LoRA layers, its Custom
Diffusion attention processors, bitsandbytes' 8-bit AdamW for the whole network; in float32 as a plain script runs, in
bfloat16 autocast as --mixed_precision does, and all in channels-last bfloat16, the fastest on a CPU. Every variant's
gradients are first checked against float32, then the steps take turns in one process.

Takes about seven minutes at 256 pixels on two cores. Adds rows to benchmarks/results/step_methods.csv.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timing
import torch
from pcs_trainer.memory.networks import networks_of
from pcs_trainer.memory.rehearsal import Rehearsal
from pcs_trainer.methods import settings_for
from registry import SD15
from step import PeerResidual, random_weights
from torch import Tensor, nn

RESULTS = timing.RESULTS / "step_methods.csv"
METHODS = ("personalized_residuals", "custom_diffusion", "textboost", "dreambooth_lora", "dreambooth")
# A method is timed against a peer's step of the same arithmetic: one without such a peer is not in METHODS.
NOT_MEASURED = {
    "textual_inversion": "diffusers' script trains the whole embedding table and undoes most of the update: "
    "no peer does the same arithmetic",
}
# Words are left out on both sides, and TextBoost's second forward pass of the text encoder.
SETTINGS: dict[str, dict[str, Any]] = {"textboost": {"augment": False, "preservation_weight": 0.0}}
SAMPLED = 24  # tensors whose gradients are compared: all of a whole network would not fit beside the networks
RATE = 1e-6  # of every optimizer: the steps are timed, nothing is to be learned
UP = 0.01  # standard deviation of the residuals' second half: of the zeros that training starts from, half is untested
Trained = dict[str, nn.Parameter]  # by the tensor's own name in its network, or the layer's with .down and .up
Gradients = dict[str, Tensor]


class Ours:
    """The method's own setup on these weights, and its step on inputs that the peers share."""

    def __init__(self, method: str, weights: dict[str, Tensor], size: int) -> None:
        torch.manual_seed(0)
        settings = settings_for(None, method, identifier="plain", train_token=False, **SETTINGS.get(method, {}))
        self.batch, side = 2 if settings.prior_weight else 1, size // 8
        self.real = Rehearsal(networks_of(SD15), settings, (self.batch, side), torch.bfloat16, "cpu", counted=False)
        self.unet = self.real.unet.set_plan(settings.plan)
        assert self.real.optimizer is not None
        for group in self.real.optimizer.param_groups:
            group["lr"] = RATE
        self.encoder: Any = self.real.encoders[0] if self.real.encoders else None
        self.trained: Trained = {n.partition(".")[2]: p for n, p in self.real.learner.weights.items()}
        with torch.no_grad():
            for name, p in self.unet.named_parameters():
                if name in weights:
                    p.copy_(weights[name])
            for name, p in self.trained.items():
                if name.endswith(".up"):
                    p.normal_(0, UP)
        self.x, self.noise = (torch.randn(self.batch, 4, side, side, dtype=torch.bfloat16) for _ in range(2))
        self.t = torch.randint(1000, (self.batch,))
        self.text = torch.randn(self.batch, 77, SD15["cross_attention_dim"], dtype=torch.bfloat16)
        self.ids = torch.randint(49000, (self.batch, 77))
        text_trains = self.encoder is not None or any(".attn2.to_k." in n or ".attn2.to_v." in n for n in self.trained)
        self.kv = None if text_trains else self.unet.text_kv(self.text)  # as once a run

    def loss(self) -> Tensor:
        text = self.text if self.encoder is None else self.encoder(self.ids).last_hidden_state
        kv = self.kv or self.real.method.hold_text(self.unet.text_kv(text))
        return (self.unet(self.x, self.t, kv).float() - self.noise.float()).square().mean()

    def step(self) -> None:
        optimizer = self.real.optimizer
        assert optimizer is not None
        if self.real.handle is not None:
            self.real.handle.backward(self.loss)
            return
        self.loss().backward()
        optimizer.step()
        optimizer.zero_grad()


@dataclass
class Variant:
    """A way to do the step, and its gradients before the optimizer sees them."""

    step: Callable[[], Any]
    gradients: Callable[[], Gradients]


def taken(loss: Callable[[], Tensor], trained: Trained) -> Gradients:
    """Gradients of a sample of the tensors, by name; nothing is accumulated, so no optimizer steps in the backward."""
    names = sorted(trained)
    names = names[:: len(names) // SAMPLED | 1]  # an odd stride: halves of residuals alternate, and both are wanted
    found = torch.autograd.grad(loss(), [trained[n] for n in names])
    return {n: g.float() for n, g in zip(names, found, strict=True)}


@dataclass(frozen=True)
class Kind:
    """How a peer is set up: dtype of what is frozen, of what trains, under autocast or not, channels last or not."""

    name: str
    frozen: torch.dtype
    trained: torch.dtype
    autocast: bool = False
    channels_last: bool = False


FP32 = Kind("diffusers fp32", torch.float32, torch.float32)
AUTOCAST = Kind("diffusers bf16 autocast", torch.bfloat16, torch.float32, autocast=True)
WHOLE_AUTOCAST = Kind("diffusers bf16 autocast", torch.float32, torch.float32, autocast=True)
BF16 = Kind("diffusers bf16 channels_last", torch.bfloat16, torch.bfloat16, channels_last=True)


class Peer:
    """diffusers' network, and what the method's script trains on it, with our values."""

    def __init__(self, kind: Kind, method: str, weights: dict[str, Tensor], ours: Ours) -> None:
        from diffusers import UNet2DConditionModel

        theirs: Any = UNet2DConditionModel  # diffusers' classes are untyped
        with torch.device("meta"):
            self.unet = theirs(**SD15)
        state = {name: w.to(kind.frozen, copy=True) for name, w in weights.items()}
        self.unet.load_state_dict(state, assign=True)
        self.unet.requires_grad_(False)
        self.kind, self.ours = kind, ours
        self.encoder: Any = None
        self.trained: Trained = getattr(self, method)()
        for name, p in self.trained.items():
            p.data = ours.trained[name].detach().view(p.shape).to(kind.trained, copy=True)
            p.requires_grad_(True)
        if kind.channels_last:
            self.unet.to(memory_format=torch.channels_last)

    def dreambooth(self) -> Trained:
        return dict(self.unet.named_parameters())

    def personalized_residuals(self) -> Trained:
        trained: Trained = {}
        for name in [n for n in self.ours.trained if n.endswith(".down")]:
            layer, pair = name.removesuffix(".down"), (name, name.removesuffix("down") + "up")
            parent, _, leaf = layer.rpartition(".")
            new = PeerResidual(self.unet.get_submodule(layer), *(self.ours.trained[n].detach() for n in pair))
            setattr(self.unet.get_submodule(parent), leaf, new)
            trained |= dict(zip(pair, (new.down, new.up)))
        return trained

    def dreambooth_lora(self) -> Trained:
        return self.peft(self.unet, ["to_q", "to_k", "to_v", "to_out.0"])

    def textboost(self) -> Trained:
        from transformers import CLIPTextModel

        ours = self.ours.encoder
        theirs: Any = CLIPTextModel
        self.encoder = theirs(ours.config).to(self.kind.frozen).eval().requires_grad_(False)
        self.encoder.load_state_dict(ours.state_dict())
        trained = self.peft(self.encoder, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])
        return {n if n in self.ours.trained else f"text_model.{n}": p for n, p in trained.items()}

    def peft(self, network: Any, layers: list[str]) -> Trained:
        from peft import LoraConfig

        network.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=layers))
        halves = {"lora_A.default.weight": "down", "lora_B.default.weight": "up"}
        return {
            n.removesuffix(end) + half: p
            for n, p in network.named_parameters()
            for end, half in halves.items()
            if n.endswith(end)
        }

    def custom_diffusion(self) -> Trained:
        from diffusers.models.attention_processor import AttnProcessor2_0, CustomDiffusionAttnProcessor2_0

        processors: dict[str, Any] = {}
        trained: Trained = {}
        for name in self.unet.attn_processors:
            layer = name.removesuffix(".processor")
            if layer.endswith("attn1"):
                processors[name] = AttnProcessor2_0()
                continue
            out, text = self.unet.get_submodule(f"{layer}.to_k").weight.shape
            with torch.device("meta"):
                new = CustomDiffusionAttnProcessor2_0(
                    train_kv=True, train_q_out=False, hidden_size=out, cross_attention_dim=text
                )
            processors[name] = new
            trained[f"{layer}.to_k.weight"] = new.to_k_custom_diffusion.weight = nn.Parameter(torch.empty(out, text))
            trained[f"{layer}.to_v.weight"] = new.to_v_custom_diffusion.weight = nn.Parameter(torch.empty(out, text))
        self.unet.set_attn_processor(processors)
        return trained

    def loss(self, autocast: bool) -> Tensor:
        s, dtype = self.ours, self.kind.frozen
        x = s.x.to(dtype)
        if self.kind.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            text = s.text.to(dtype) if self.encoder is None else self.encoder(s.ids).last_hidden_state
            out = self.unet(x, s.t, text.to(dtype)).sample
        return (out.float() - s.noise.float()).square().mean()

    def variant(self, optimizer: torch.optim.Optimizer, autocast: bool) -> Variant:
        def step() -> None:
            self.loss(autocast).backward()
            optimizer.step()
            optimizer.zero_grad()

        return Variant(step, lambda: taken(lambda: self.loss(autocast), self.trained))


def peers(method: str, weights: dict[str, Tensor], ours: Ours) -> Iterable[tuple[str, Variant]]:
    """Small sets train with torch's fused AdamW; float32 networks as a whole with bitsandbytes' 8-bit states."""
    for kind in (FP32, BF16) if method == "dreambooth" else (FP32, AUTOCAST, BF16):
        peer = Peer(kind, method, weights, ours)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(peer.trained.values(), lr=RATE, fused=True)
        if method == "dreambooth" and kind is FP32:
            import bitsandbytes

            optimizer = bitsandbytes.optim.AdamW8bit(peer.trained.values(), lr=RATE)
            # The same float32 network serves both: a second one would not fit beside it.
            yield WHOLE_AUTOCAST.name, peer.variant(optimizer, autocast=True)
        yield kind.name, peer.variant(optimizer, kind.autocast)


def check(variants: dict[str, Variant]) -> None:
    """Ours may err at most twice what the bfloat16 peers do, or nothing is timed."""
    exact = variants[FP32.name].gradients()

    def error(found: Gradients) -> float:
        square = sum((found[n] - g.view_as(found[n])).double().square().sum().item() for n, g in exact.items())
        return (square / sum(g.double().square().sum().item() for g in exact.values())) ** 0.5

    errors = {name: error(v.gradients()) for name, v in variants.items()}
    for name, e in errors.items():
        print(f"    gradients against float32: {name:34} {e:.2e}", flush=True)
    if errors["pcs"] > 2 * max(1e-3, *(e for name, e in errors.items() if "bf16" in name)):
        raise SystemExit("pcs: the gradients are wrong, so nothing is timed")


def measure(variants: dict[str, Variant], rounds: int) -> dict[str, list[float]]:
    for v in variants.values():
        v.step()  # the optimizer's states are made
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, v in variants.items():
            start = time.perf_counter()
            v.step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def one_method(method: str, weights: dict[str, Tensor], size: int, rounds: int) -> list[dict[str, object]]:
    ours = Ours(method, weights, size)
    variants = {"pcs": Variant(ours.step, lambda: taken(ours.loss, ours.trained))}
    variants |= dict(peers(method, weights, ours))
    check(variants)
    seconds = measure(variants, rounds)
    rows = []
    for name, times in seconds.items():
        middle, low, high = timing.ratio(times, seconds["pcs"])
        took = statistics.median(times)
        print(f"  {method:24} {name:30} {took:7.2f} s  {middle:.2f} x ours ({low:.2f}-{high:.2f})", flush=True)
        rows.append(
            {
                "size": size,
                "method": method,
                "batch": ours.batch,
                "variant": name,
                "rounds": rounds,
                "seconds": f"{took:.3f}",
                "ours_is_faster": f"{middle:.2f}",
                "quartile_low": f"{low:.2f}",
                "quartile_high": f"{high:.2f}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, nargs="*", default=METHODS)
    parser.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print, but add nothing to the results")
    options = parser.parse_args()
    torch.manual_seed(0)
    weights, rows = random_weights(), []
    for method in options.method:
        rows += one_method(method, weights, options.size, options.rounds)
        gc.collect()
    if not options.dry:
        facts = timing.circumstances()
        timing.append(RESULTS, [{**facts, **row} for row in rows])


if __name__ == "__main__":
    main()
