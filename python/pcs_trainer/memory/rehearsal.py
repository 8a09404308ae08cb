"""One training step of a method on a network of the right shape: on the meta device to be counted, or for real.

What a method trains here has the shapes and dtypes of the real thing; values are of no interest. Weights are in the
training dtype (bfloat16), what is trained beside them in float32, except that DreamBooth trains the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pcs_kernels
from pcs_kernels.optim import AdamW8bit, StepInBackward, step_in_backward, sum_of_squares

from ..model.model import Model
from ..model.sources import Folder, find_source, read_json
from ..model.text_adapters import TextLowRank, adapters, attach_text
from ..settings import Settings
from ..training.optimizer import LARGEST_COPY
from ..unet.layers import LowRank
from ..unet.unet import UNet
from .ledger import Ledger, StepCount
from .recipes import n_rows, trained_by, uses_text

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
# The text encoders of the known families, by the width of the text states; for a UNet that comes without any.
KNOWN_TEXT = {
    768: [CLIP_L],
    1024: [CLIP_H],
    2048: [CLIP_L, CLIP_G | {"projection_dim": 1280, "architectures": ["CLIPTextModelWithProjection"]}],
}


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


class Rehearsal:
    """The networks, what the method trains of them, and a step. On "meta" nothing is computed."""

    def __init__(
        self, networks: Networks, settings: Settings, size: tuple[int, int], dtype: torch.dtype,
        device: str = "meta", accumulate: bool = False, counted: bool = True,
    ) -> None:  # fmt: skip
        self.settings, self.dtype, self.device = settings, dtype, device
        self.images, self.latent = size  # pictures in one forward, side of the latents
        self.accumulate = accumulate
        self.unet = self._filled(UNet.from_config(networks.unet, device="meta"))
        c = self.unet.settings
        self.channels, self.width = c["in_channels"], c["cross_attention_dim"]
        self.tokens = networks.text[0].get("max_position_embeddings", 77) if networks.text else 77
        self.uses_text = uses_text(settings)
        self.encoders = [self._filled(_text_encoder(config)) for config in networks.text] if self.uses_text else []
        if self.uses_text and not self.encoders:
            wanted = 'give a whole model, or {"unet": {...}, "text_encoder": {...}}'
            raise ValueError(f"{settings.method} works on the text encoder, and none is known for this UNet; {wanted}")
        self.in_backward = settings.step_in_backward and not accumulate
        self.rows = [self._new(n_rows(settings), e.config.hidden_size) for e in self.encoders if n_rows(settings)]
        self.trained = [*trained_by(settings)(self), *self.rows]
        self.cached = None if self.uses_text or self._trains_text_kv() else self._cached_text()
        self.optimizer: AdamW8bit | None = None
        self.handle: StepInBackward | None = None
        self.ledger: Ledger | None = None
        self.warm = False
        if counted:
            self.looks = _bytes_an_element(self._look) if self.in_backward else 0
            for p in self.trained:
                p.register_post_accumulate_grad_hook(self._gradient)
        else:
            self.optimizer = AdamW8bit(self.trained)
            clip = settings.clip_norm or None
            self.handle = step_in_backward(self.optimizer, 1, clip, settings.clip) if self.in_backward else None

    def _filled(self, network: nn.Module) -> nn.Module:
        """The network in the training dtype on the device, frozen, with small numbers in it."""
        for module in network.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                value = torch.empty(p.shape, dtype=self.dtype, device=self.device)
                value = value.fill_(0.01) if p.dim() < 2 else value.normal_(0, p[0].numel() ** -0.5)
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
            for name, buffer in list(module.named_buffers(recurse=False)):
                places = torch.arange(buffer.shape[-1], device=self.device).expand(buffer.shape)
                module.register_buffer(name, places, persistent=False)  # CLIP's one buffer holds the places
        return network.eval()

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

    def master(self, name: str) -> nn.Parameter:
        """A parameter of the UNet trained in float32 in place of the network's own."""
        module, _, leaf = name.rpartition(".")
        p = nn.Parameter(self.unet.get_parameter(name).detach().float())
        self.unet.get_submodule(module).register_parameter(leaf, p)
        return p

    def _look(self, gradient: Tensor) -> None:
        """What the step in the backward does with a gradient before it takes the step."""
        sum_of_squares(gradient)

    def _gradient(self, p: Tensor) -> None:
        if self.ledger is not None:
            self.ledger.is_gradient(p.grad)
        if self.in_backward:
            torch.empty(self.looks * p.numel(), dtype=torch.uint8, device=self.device)  # freed at once
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
        if self.settings.method == "textboost" and self.settings.preservation_weight:
            loss = loss + self.text()[0].float().square().mean()
        return loss

    def step(self) -> None:
        """Forward, backward and, where it is for real, the optimizer's step."""
        if self.handle is not None:
            self.handle.backward(self.loss)
            return
        loss = self.loss()
        if self.ledger is not None:
            self.ledger.forward_ends()
        loss.backward()
        if self.optimizer is not None and not self.in_backward:
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
        copied = sum(p.numel() for p in self.trained) <= LARGEST_COPY
        return found | {
            "trained in float32": masters,
            "copy of the last good state": sum(p.nbytes for p in self.trained) * copied,
            "cached text": text,
            "optimizer state": sum(state_bytes(p, self.settings.optimizer) for p in self.trained),
        }

    def count(self) -> StepCount:
        """A step counted, after a forward that makes what lasts."""
        with pcs_kernels.backend("reference"):
            if not self.warm:
                self._warm_up()
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

    def _warm_up(self) -> None:
        with torch.no_grad():
            self.loss()
        if self.accumulate:
            for p in self.trained:
                p.grad = torch.zeros_like(p)
        self.warm = True

    def _lasting(self) -> list[Tensor]:
        networks = [self.unet, *self.encoders]
        tensors = [t for n in networks for t in (*n.parameters(), *n.buffers())] + self.unet.derived() + self.trained
        tensors += [p.grad for p in self.trained if p.grad is not None]
        return tensors + [t for pair in (self.cached or {}).values() for t in pair]


def _bytes_an_element(look: Callable[[Tensor], None]) -> int:
    """The most bytes that looking at a bfloat16 gradient makes, for each of its elements."""
    gradient = torch.zeros(1000, dtype=torch.bfloat16, device="meta")
    with Ledger([gradient]) as ledger:
        look(gradient)
    return ledger.result().peak // 1000


def state_bytes(p: Tensor, optimizer: str) -> int:
    """AdamW8bit: two bytes an element, two scales a block of 256, two code maps; small tensors 8. AdamW: two copies."""
    n = p.numel()
    if optimizer == "adamw":
        return 2 * p.nbytes
    return 2 * n + 2 * 4 * -(-n // 256) + 2 * 1024 if n >= 4096 else 8 * n


def _text_encoder(config: dict[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    projects = (config.get("architectures") or [""])[0] == "CLIPTextModelWithProjection"
    with torch.device("meta"):
        return (CLIPTextModelWithProjection if projects else CLIPTextModel)(CLIPTextConfig(**config))
