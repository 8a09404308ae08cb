"""One training step of a method on a network of the right shape: on the meta device to be counted, or for real.

What a method trains here has the shapes and dtypes of the real thing; values are of no interest. Weights are in the
training dtype (bfloat16), what is trained beside them in float32, except that DreamBooth trains the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pcs_kernels
from pcs_kernels.optim import AdamW8bit, step_in_backward

from .counting import Ledger, StepCount
from .layers import LowRank
from .model import Model
from .sources import Folder, find_source, read_json
from .text import TextLowRank, adapters, attach_text
from .unet import UNet

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
# The text encoders of the known families, by the width of the text states; for a UNet that comes without any.
KNOWN_TEXT = {
    768: [CLIP_L],
    1024: [CLIP_H],
    2048: [CLIP_L, CLIP_G | {"projection_dim": 1280, "architectures": ["CLIPTextModelWithProjection"]}],
}
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass
class Networks:
    """The configurations of a model's UNet and text encoders, and how many pixels a latent one stands for."""

    unet: dict[str, Any]
    text: list[dict[str, Any]]
    pixels: int = 8

    @property
    def resolution(self) -> int:
        """The side of the pictures that the model was made for."""
        return (self.unet.get("sample_size") or 64) * self.pixels


def networks_of(model: Any) -> Networks:
    """The configurations of a Model, a UNet, a folder, a hub name or a configuration; nothing is loaded."""
    if isinstance(model, UNet):
        return _with_text(model.config, [])
    if isinstance(model, dict):
        text = model.get("text_encoder", [])
        return _with_text(model.get("unet", model), [text] if isinstance(text, dict) else list(text))
    if isinstance(model, (str, Path)) and (Path(model) / "config.json").is_file():
        return _with_text(read_json(Path(model) / "config.json"), [])
    if isinstance(model, (str, Path)):
        source = find_source(model, None, fp16=True)
        model = Model(source, None, "cpu")
    if not isinstance(model, Model):
        kinds = "a Model, a UNet, a folder, a hub name or a UNet's configuration"
        raise ValueError(f"model must be {kinds}, not {type(model).__name__}")
    if not isinstance(model.source, Folder):
        return _with_text(model.unet.config, [encoder.config.to_dict() for encoder in model.text_encoders])
    source = model.source
    text = [read_json(source.part(n) / "config.json") for n in ("text_encoder", "text_encoder_2") if source.has(n)]
    networks = _with_text(read_json(source.part("unet") / "config.json"), text)
    if source.has("vae"):
        levels = read_json(source.part("vae") / "config.json").get("block_out_channels", (0,) * 4)
        networks.pixels = 2 ** (len(levels) - 1)
    return networks


def _with_text(unet: dict[str, Any], text: list[dict[str, Any]]) -> Networks:
    width = unet.get("cross_attention_dim", 1280)
    width = width if isinstance(width, int) else width[0]
    return Networks(unet, text or KNOWN_TEXT.get(width, []))


@dataclass(frozen=True)
class Recipe:
    """What of a method its memory depends on."""

    trains: Callable[[Rehearsal], list[nn.Parameter]]
    batch: int  # pictures of the subject in a step
    prior: int = 0  # prior or regularization pictures for each of them
    in_backward: bool = False  # the optimizer step is taken inside the backward
    text: bool = False  # the text encoders are at work in every step
    frozen_text_too: bool = False  # a second text of as many captions, for the knowledge-preservation loss
    options: dict[str, Any] = field(default_factory=dict)


class Rehearsal:
    """The networks, what the method trains of them, and a step. On "meta" nothing is computed."""

    def __init__(
        self, networks: Networks, recipe: Recipe, options: dict[str, Any], size: tuple[int, int], dtype: torch.dtype,
        device: str = "meta", accumulate: bool = False, counted: bool = True,
    ) -> None:  # fmt: skip
        self.recipe, self.options, self.dtype, self.device = recipe, options, dtype, device
        self.images, self.latent = size  # pictures in one forward, side of the latents
        self.accumulate = accumulate
        self.unet = self._filled(UNet.from_config(networks.unet, device="meta"))
        c = self.unet.settings
        self.channels, self.width = c["in_channels"], c["cross_attention_dim"]
        self.tokens = networks.text[0].get("max_position_embeddings", 77) if networks.text else 77
        self.uses_text = recipe.text or bool(options.get("text_encoder") or options.get("train_token"))
        self.encoders = [self._filled(_text_encoder(config)) for config in networks.text] if self.uses_text else []
        if self.uses_text and not self.encoders:
            raise ValueError(f"the text encoders of a model with text states {self.width} wide must be given: {WANTED}")
        self.rows = [self._new(len_of_rows(options), encoder.config.hidden_size) for encoder in self.encoders]
        self.rows = self.rows if options.get("train_token") else []
        self.trained = [*recipe.trains(self), *self.rows]
        self.cached = None if self.uses_text or self._trains_text_kv() else self._cached_text()
        self.optimizer: AdamW8bit | None = None
        self.ledger: Ledger | None = None
        self.warm = False
        if counted:
            for p in self.trained:
                p.register_post_accumulate_grad_hook(self._gradient)
        else:
            self.optimizer = AdamW8bit(self.trained)
            self.handle = step_in_backward(self.optimizer) if recipe.in_backward and not accumulate else None

    def _filled(self, network: nn.Module) -> nn.Module:
        """The network in the training dtype, frozen; off the meta device with small numbers."""
        network = network.to(self.dtype).requires_grad_(False).eval()
        if self.device != "meta":
            network = network.to_empty(device=self.device)
            with torch.no_grad():
                for p in network.parameters():
                    p.fill_(0.01) if p.dim() < 2 else p.normal_(0, p[0].numel() ** -0.5)
                for name, buffer in network.named_buffers():
                    if name.endswith("position_ids"):
                        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
        return network

    def _new(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, device=self.device).normal_(0, 0.02))

    def _trains_text_kv(self) -> bool:
        return any(p.requires_grad for name, p in self.unet.named_parameters() if ".attn2.to_" in name)

    def _cached_text(self) -> Any:
        """A frozen text's keys and values are computed once a run."""
        with torch.no_grad():
            return self.unet.text_kv(self._zeros(self.images, self.tokens, self.width))

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def residual(self, name: str, rank: int) -> list[nn.Parameter]:
        """A low-rank residual on one projection of the UNet."""
        c_out, c_in = self.unet.get_submodule(name).weight.shape[:2]
        pair = self._new(rank, c_in), self._new(c_out, rank)
        self.unet.attach(name, LowRank(*pair))
        return list(pair)

    def text_residuals(self, layers: tuple[str, ...], rank: int) -> list[nn.Parameter]:
        """Low-rank residuals on the named layers of every text encoder."""
        pairs = []
        for encoder in self.encoders:
            for name, layer in list(encoder.named_modules()):
                if isinstance(layer, nn.Linear) and name.endswith(layers):
                    pair = self._new(rank, layer.in_features), self._new(layer.out_features, rank)
                    attach_text(encoder, name, TextLowRank(*pair))
                    pairs += pair
        return pairs

    def master(self, module: nn.Module, name: str = "weight") -> nn.Parameter:
        """A weight trained in float32 in place of the network's own."""
        p = nn.Parameter(getattr(module, name).detach().float())
        setattr(module, name, p)
        return p

    def _gradient(self, p: Tensor) -> None:
        if self.ledger is not None:
            self.ledger.is_gradient(p.grad)
        if self.recipe.in_backward and not self.accumulate:
            p.grad = None

    def text(self) -> tuple[Tensor, Tensor | None]:
        """(text states, SDXL's pooled text) with the gradient of what is trained there."""
        parts, pooled = [], None
        ids = self._zeros(self.images, self.tokens, dtype=torch.long)
        for e, encoder in enumerate(self.encoders):
            adapters(encoder).rows = (self.rows[e], ids) if self.rows else None
            out = encoder(ids, output_hidden_states=len(self.encoders) > 1)
            parts.append(out.hidden_states[-2] if len(self.encoders) > 1 else out.last_hidden_state)
            pooled = getattr(out, "text_embeds", None)
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0], pooled

    def loss(self) -> Tensor:
        """The error of the prediction, and of the text states where they are held."""
        side = (self.images, self.channels, self.latent, self.latent)
        states, pooled = self.text() if self.uses_text else (None, None)
        context = self.cached if states is None else states
        if context is None:
            context = self._zeros(self.images, self.tokens, self.width)
        added = None
        if self.unet.add_embedding is not None:
            wide = self.unet.add_embedding.linear_1.in_features - 6 * self.unet.settings["addition_time_embed_dim"]
            pooled = self._zeros(self.images, wide) if pooled is None else pooled
            added = {"text_embeds": pooled, "time_ids": self._zeros(self.images, 6)}
        if self.unet.class_embedding is not None:
            added = {"class_labels": self._zeros(self.images, dtype=torch.long)}
        x = torch.randn(side, device=self.device).to(self.dtype)
        error = self.unet(x, self._zeros(self.images, dtype=torch.long), context, added).float()
        loss = (error - torch.randn_like(error)).square().mean()
        if self.recipe.frozen_text_too:
            loss = loss + self.text()[0].float().square().mean()
        return loss

    def step(self) -> None:
        """Forward, backward and, off the meta device, the optimizer's step."""
        loss = self.loss()
        if self.ledger is not None:
            self.ledger.forward_ends()
        loss.backward()
        if self.optimizer is not None and self.recipe.in_backward:
            return
        if self.optimizer is not None:
            self.optimizer.step()
        if not self.accumulate:
            for p in self.trained:
                p.grad = None

    def weights(self) -> dict[str, int]:
        """Bytes that are there before, during and after the step, by component."""
        trained = {id(p) for p in self.trained}
        in_place = {id(p) for p in self.trained if p.dtype is self.dtype}
        owned = {"UNet weights": list(self.unet.parameters()),
                 "text encoder weights": [p for encoder in self.encoders for p in encoder.parameters()]}  # fmt: skip
        found = {
            name: sum(p.nbytes for p in ps if id(p) not in trained or id(p) in in_place) for name, ps in owned.items()
        }
        masters = sum(p.nbytes for p in self.trained if id(p) not in in_place)
        text = 0 if self.cached is None else sum(t.nbytes for pair in self.cached.values() for t in pair)
        return found | {"trained in float32": masters, "cached text": text,
                        "optimizer state": sum(state_bytes(p.numel()) for p in self.trained)}  # fmt: skip

    def count(self) -> StepCount:
        """The second step, counted: the first makes what lasts."""
        with pcs_kernels.backend("reference"):
            if not self.warm:
                self.step()
            self.warm = True
            self.ledger = Ledger(self._lasting())
            handles = self.ledger.watch(self.unet.layers())
            try:
                with self.ledger:
                    self.step()
            finally:
                for handle in handles:
                    handle.remove()
                ledger, self.ledger = self.ledger, None
        return ledger.result()

    def _lasting(self) -> list[Tensor]:
        networks = [self.unet, *self.encoders]
        tensors = [t for n in networks for t in (*n.parameters(), *n.buffers())] + self.unet.derived() + self.trained
        tensors += [p.grad for p in self.trained if p.grad is not None]
        return tensors + [t for pair in (self.cached or {}).values() for t in pair]


WANTED = 'give a whole model\'s folder, or {"unet": {...}, "text_encoder": {...}}'


def len_of_rows(options: dict[str, Any]) -> int:
    """Learned rows: the subject's word, and TextBoost's augmentation words where there are any."""
    return 1 + options.get("augmentation_rows", 0)


def state_bytes(n: int, block: int = 256, least: int = 4096) -> int:
    """AdamW8bit's state of a tensor of n elements: two bytes each, a scale a block and two code maps; small ones 8."""
    return 2 * n + 2 * 4 * -(-n // block) + 2 * 1024 if n >= least else 8 * n


def _text_encoder(config: dict[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    projects = (config.get("architectures") or [""])[0] == "CLIPTextModelWithProjection"
    with torch.device("meta"):
        return (CLIPTextModelWithProjection if projects else CLIPTextModel)(CLIPTextConfig(**config))
