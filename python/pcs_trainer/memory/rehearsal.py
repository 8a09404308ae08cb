"""One training step of a method on a network of the right shape: on the meta device to be counted, or for real.

The method's own setup puts what trains on networks without contents, so shapes and dtypes are those of the real thing;
values are of no interest. Weights are in the training dtype (bfloat16), what is trained beside them in float32, except
that DreamBooth trains the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import pcs_kernels
from pcs_kernels.optim import AdamW8bit, StepInBackward, step_in_backward, sum_of_squares
from pcs_kernels.optim.away import ring_bytes as states_ring

from ..methods import method_named
from ..methods.start import learner_for
from ..model.model import Model
from ..model.text import by_block
from ..model.text_adapters import adapters
from ..settings import Settings
from ..training.optimizer import LARGEST_COPY
from ..training.proof import gradients, some
from ..unet.streaming import ring_bytes, waiting_weights
from .blank import BlankModel, BlankVocabulary
from .ledger import Ledger, StepCount
from .networks import Networks

CODED = 4096  # elements from which on AdamW8bit codes a state
FROZEN_COPY = "frozen copy of the UNet"
WORD = "<subject>"  # where the settings name none: causal residuals act from a word on


class Rehearsal:
    """The networks, what the method trains of them, and a step. On "meta" nothing is computed.

    Args:
        networks: the configurations of the model.
        settings: the method's settings.
        size: (pictures in one forward, side of the latents).
        dtype: of the model's weights.
        device: "meta", "cpu" under FakeTensorMode, or a real device.
        accumulate: gradients are kept from one forward to the next.
        counted: count the step's storages; otherwise the step is real, with an optimizer.
    """

    def __init__(
        self,
        networks: Networks,
        settings: Settings,
        size: tuple[int, int],
        dtype: torch.dtype,
        device: str = "meta",
        accumulate: bool = False,
        counted: bool = True,
    ) -> None:
        self.settings, self.dtype, self.device = settings, dtype, device
        self.method = method_named(settings.method)
        self.images, self.latent = size
        self.accumulate = accumulate
        resident = "device" if counted else settings.resident
        self.model = BlankModel(networks, dtype, device, settings.method, settings.weights, resident)
        self.unet = self.model.unet
        vocabulary = BlankVocabulary(networks, device, settings.token_vectors)
        self.word = settings.token or WORD
        self.learner = learner_for(cast(Model, self.model), [replace(settings, token=self.word)], vocabulary)
        self.trained = list(self.learner.parameters.values())
        c = self.unet.settings
        self.channels, self.width = c["in_channels"], c["cross_attention_dim"]
        self.tokens = networks.text[0].get("max_position_embeddings", 77) if networks.text else 77
        self.uses_text = self.learner.text_trains
        self.encoders: list[Any] = self.model.text_encoders if self.uses_text else []
        self.in_backward = settings.step_in_backward and not accumulate
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
            self.optimizer = AdamW8bit(self.trained, states=settings.states)
            clip = settings.clip_norm or None
            self.handle = step_in_backward(self.optimizer, 1, clip, settings.clip) if self.in_backward else None

    def _trains_text_kv(self) -> bool:
        places = tuple(f"unet.{name}." for name in self.unet.text_projections())
        return any(name.startswith(places) for name in self.learner.weights)

    def _cached_text(self) -> Any:
        """A frozen text's keys and values are computed once a run."""
        with torch.no_grad():
            return self.unet.text_kv(self._zeros(self.images, self.tokens, self.width))

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def _look(self, gradient: Tensor) -> None:
        """What the step in the backward does with a gradient before it takes the step."""
        sum_of_squares(gradient)

    def _gradient(self, p: Tensor) -> None:
        if self.ledger is not None and p.grad is not None:
            self.ledger.is_gradient(p.grad)
        if self.in_backward:
            torch.empty(self.looks * p.numel(), dtype=torch.uint8, device=self.device)  # freed at once
            p.grad = None

    def text(self) -> tuple[Tensor | dict[str, Tensor], Tensor | None]:
        """(text states, SDXL's pooled text) with the gradient of what is trained there."""
        parts, pooled = [], None
        ids = self._zeros(self.images, self.tokens, dtype=torch.long)
        rows = self.learner.rows
        for e, encoder in enumerate(self.encoders):
            state = adapters(encoder)
            state.rows = (torch.cat([own[e] for own in rows.values()]), ids) if rows else None
            state.reached = {self.word: self._zeros(self.images, self.tokens, dtype=torch.float32)}
            out = encoder(ids, output_hidden_states=len(self.encoders) > 1)
            parts.append(out.hidden_states[-2] if len(self.encoders) > 1 else out.last_hidden_state)
            pooled = getattr(out, "text_embeds", None)
        joined = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]  # [B, T, C]
        return by_block(cast(Model, self.model), joined), pooled

    def loss(self) -> Tensor:
        """The error of the prediction, and of the text states where they are held."""
        side = (self.images, self.channels, self.latent, self.latent)
        states, pooled = self.text() if self.uses_text else (None, None)
        context: Any = self.cached
        if context is None:
            states = self._zeros(self.images, self.tokens, self.width) if states is None else states
            context = self.unet.text_kv(states)
        context = self.method.hold_text(context)
        x = torch.randn(side, device=self.device).to(self.dtype)
        times = self._zeros(self.images, dtype=torch.long)
        error = self.unet(x, times, context, self._added(self.images, pooled)).float()
        loss = (error - torch.randn_like(error)).square().mean()
        if self.method.reads_more_text(self.settings):
            more, _ = self.text()
            for part in more.values() if isinstance(more, dict) else [more]:
                loss = loss + part.float().square().mean()
        return loss

    def _added(self, images: int, pooled: Tensor | None = None) -> dict[str, Tensor] | None:
        """SDXL's further inputs, or an up-scaler's noise level."""
        embedding = self.unet.add_embedding
        if self.unet.class_embedding is not None:
            return {"class_labels": self._zeros(images, dtype=torch.long)}
        if embedding is None:
            return None
        wide = embedding.linear_1.in_features - 6 * self.unet.settings["addition_time_embed_dim"]
        pooled = self._zeros(images, wide) if pooled is None else pooled
        return {"text_embeds": pooled, "time_ids": self._zeros(images, 6)}

    def frozen_prediction(self, images: int, latent: int) -> StepCount:
        """A prediction counted before a network that trains whole has begun to: its weights are packed like any."""
        for p in self.trained:
            p.requires_grad_(False)
        try:
            return self.prediction(images, latent)
        finally:
            for p in self.trained:
                p.requires_grad_(True)
            self.unet.forget_derived()

    @torch.no_grad()
    def prediction(self, images: int, latent: int) -> StepCount:
        """A prediction counted that keeps nothing, as sampling makes it."""
        x = self._zeros(images, self.channels, latent, latent)
        times = self._zeros(images, dtype=torch.long)
        states = self._zeros(images, self.tokens, self.width)
        with pcs_kernels.backend("reference"), Ledger(self._lasting()) as ledger:
            self.unet(x, times, self.unet.text_kv(states), self._added(images))
        return ledger.result()

    def comparison(self) -> int:
        """Bytes that the gradients of both backends and the reference's own temporaries take."""
        parameters = some(self.learner.parameters)
        with pcs_kernels.backend("reference"), Ledger(self._lasting(), whole=True) as ledger:
            ours, theirs = gradients(parameters, self.loss), gradients(parameters, self.loss)
            del ours, theirs
        return ledger.result().peak

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

    def weights(self, s: Settings) -> dict[str, int]:
        """Bytes that are there before, during and after the step, by component; settings say what waits elsewhere."""
        trained = {id(p) for p in self.trained}
        in_place = {id(p) for p in self.trained if p.dtype is self.dtype}
        owned: dict[str, list[nn.Parameter]] = {
            "UNet weights": list(self.unet.parameters()),
            "text encoder weights": [p for encoder in self.encoders for p in encoder.parameters()],
        }
        found = {
            name: sum(p.nbytes for p in ps if id(p) not in trained or id(p) in in_place) for name, ps in owned.items()
        }
        if s.resident == "streamed":
            waiting = sum(p.nbytes for p in waiting_weights(self.unet) if id(p) not in trained)
            found["UNet weights"] += ring_bytes(self.unet) - waiting
        masters = sum(p.nbytes for p in self.trained if id(p) not in in_place)
        text = 0 if self.cached is None else sum(t.nbytes for pair in self.cached.values() for t in pair)
        keeps_base = s.prior == "own" and self.learner.trains_whole_network
        copied = sum(p.numel() for p in self.trained) <= LARGEST_COPY
        return found | {
            "trained in float32": masters,
            "kept beside what trains": sum(t.nbytes for t in self._kept()),
            "copy of the last good state": sum(p.nbytes for p in self.trained) * copied,
            FROZEN_COPY: found["UNet weights"] * keeps_base,
            "cached text": text,
            "optimizer state": self._states(s),
        }

    def _states(self, s: Settings) -> int:
        """The optimizer's state on the device."""
        states = [(p, state_bytes(p, s.optimizer)) for p in self.trained]
        coded = [p for p, _ in states if p.numel() >= CODED]
        if s.states == "device" or not coded:
            return sum(size for _, size in states)
        small = sum(size for p, size in states if p.numel() < CODED)
        return small + states_ring(max(p.numel() for p in coded))

    def _kept(self) -> list[Tensor]:
        """Frozen halves of what trains, and on the CPU the values that are put back in the end."""
        return [*self.learner.fixed.values(), *(self.learner.originals if self.device == "cpu" else ())]

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
        tensors += self._kept()
        tensors += [p.grad for p in self.trained if p.grad is not None]
        return tensors + [t for pair in (self.cached or {}).values() for t in pair]


def _bytes_an_element(look: Callable[[Tensor], None]) -> int:
    """The most bytes that looking at a bfloat16 gradient makes, for each of its elements."""
    gradient = torch.zeros(1000, dtype=torch.bfloat16, device="meta")
    with Ledger([gradient]) as ledger:
        look(gradient)
    return ledger.result().peak // 1000


def state_bytes(p: Tensor, optimizer: str) -> int:
    """AdamW8bit: two bytes an element, two scales a block of 256, two code maps; small tensors 8.

    AdamW: two averages in float32; of a tensor in 16 bits also a copy in float32, and its gradient during the step.
    """
    n = p.numel()
    if optimizer == "adamw":
        return 8 * n if p.dtype == torch.float32 else 16 * n
    return 2 * n + 2 * 4 * -(-n // 256) + 2 * 1024 if n >= CODED else 8 * n
