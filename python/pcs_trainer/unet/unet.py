"""The UNet of Stable Diffusion 1.x, 2.x and XL, on this package's kernels, with diffusers' parameter names.

Letters: B batch, C channels, H x W image, N = H W positions of a block, T text tokens, G capture groups.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcs_kernels import WeightRing

from .blocks import (
    Conditioning,
    Level,
    MaskOf,
    Resample,
    ResnetBlock,
    TextKV,
    Transformer,
    TransformerBlock,
    module_list,
)
from .config import checked_config
from .layers import Conv2d, GroupNorm, Linear, LowRank, Stack, TimestepEmbedding, sinusoid
from .plans import short_plan
from .recompute import direct, rebuilt

P = ParamSpec("P")
R = TypeVar("R")


def alone(work: Callable[Concatenate[UNet, P], R]) -> Callable[Concatenate[UNet, P], R]:
    """One thread's prediction at a time where weights are streamed: they pass through one ring.

    A backward is not among what waits: while one thread trains on a streamed UNet no other may use it.
    """

    @functools.wraps(work)
    def run(unet: UNet, *args: P.args, **kwargs: P.kwargs) -> R:
        with nullcontext() if unet.ring is None else unet.ring.alone():
            return work(unet, *args, **kwargs)

    return run


class UNet(nn.Module):
    """diffusers' UNet2DConditionModel for SD1.x, SD2.x and SDXL: the same configuration, names and numbers."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        c = self.settings = checked_config(config)
        channels, c_time = c["block_out_channels"], c["time_embedding_dim"]
        top = len(channels) - 1

        def resnet(c_in: int, c_out: int) -> ResnetBlock:
            return ResnetBlock(c_in, c_out, c_time, c["norm_num_groups"], c["norm_eps"])

        def attention(level: int, only_cross: bool) -> Transformer:
            heads, depth = c["attention_head_dim"][level], c["transformer_layers_per_block"][level]
            width, groups, linear = channels[level], c["norm_num_groups"], c["use_linear_projection"]
            return Transformer(width, heads, depth, c["cross_attention_dim"], groups, linear, only_cross)

        self.ring: WeightRing | None = None  # through which frozen weights reach the device, where they are streamed
        self.conv_in = Conv2d(c["in_channels"], channels[0], 3)
        self.time_embedding = TimestepEmbedding(channels[0], c_time)
        self.class_embedding = nn.Embedding(c["num_class_embeds"], c_time) if c["num_class_embeds"] else None
        c_added = c["projection_class_embeddings_input_dim"] if c["addition_embed_type"] == "text_time" else None
        self.add_embedding = TimestepEmbedding(c_added, c_time) if c_added else None
        width, skips, downs, ups = channels[0], [channels[0]], [], []
        for i, kind in enumerate(c["down_block_types"]):
            n = c["layers_per_block"][i]
            resnets = [resnet(width if j == 0 else channels[i], channels[i]) for j in range(n)]
            text_only = c["only_cross_attention"][i]
            attentions = [attention(i, text_only) for _ in range(n)] if kind.startswith("CrossAttn") else []
            downs.append(Level(resnets, attentions, down=i < top, up=False))
            width = channels[i]
            skips += [width] * (n + (i < top))
        mid = None
        if c["mid_block_type"]:
            mid = Level([resnet(width, width), resnet(width, width)], [attention(top, False)], down=False, up=False)
        for i, kind in enumerate(c["up_block_types"]):
            level = top - i
            n = c["layers_per_block"][level] + 1
            resnets = []
            for _ in range(n):
                resnets.append(resnet(width + skips.pop(), channels[level]))
                width = channels[level]
            text_only = c["only_cross_attention"][level]
            attentions = [attention(level, text_only) for _ in range(n)] if kind.startswith("CrossAttn") else []
            ups.append(Level(resnets, attentions, down=False, up=i < top))
        # in diffusers' order, which the state dict and a plan that lists layers follow
        self.down_blocks, self.up_blocks, self.mid_block = module_list(downs), module_list(ups), mid
        self.conv_norm_out = GroupNorm(c["norm_num_groups"], channels[0], c["norm_eps"])
        self.conv_out = Conv2d(channels[0], c["out_channels"], 3)
        self._index()

    def _index(self) -> None:
        """The layers in the order in which they run, and the products that many of them share."""
        levels = [*self.down_blocks, *([self.mid_block] if self.mid_block is not None else []), *self.up_blocks]
        self._resnets = [r for level in levels for r in level.resnets]
        self._blocks: list[TransformerBlock] = []
        for name, module in self.named_modules():
            if isinstance(module, TransformerBlock):
                module.name = name
        for level in levels:
            self._blocks += [block for attention in level.attentions for block in attention.transformer_blocks]
        largest = max(m.weight.numel() for m in self.modules() if isinstance(m, (Linear, Conv2d)))
        self._time_stack = Stack([r.time_emb_proj for r in self._resnets], largest)
        self._over_text = [(name, b.name, attn) for b in self._blocks for name, attn in b.over_text()]
        self._kv_stack = Stack([layer for _, _, attn in self._over_text for layer in (attn.to_k, attn.to_v)], largest)

    @classmethod
    def from_config(cls, config: dict[str, Any] | str | Path, device: torch.device | str | None = None) -> UNet:
        """A UNet with torch's random weights.

        Args:
            config: diffusers' config.json, or its contents.
            device: where it is built, default: the CPU; on "meta" it takes no memory.
        """
        values: dict[str, Any] = config if isinstance(config, dict) else json.loads(Path(config).read_text())
        with torch.device(device or "cpu"):
            return cls(values)

    def layers(self) -> dict[str, ResnetBlock | Transformer | Resample]:
        """The layers that take a memory plan, by name, in the order in which their names stand in the state dict."""
        return {n: m for n, m in self.named_modules() if isinstance(m, (ResnetBlock, Transformer, Resample))}

    def attention_names(self) -> list[str]:
        """The transformer blocks in the order in which they run: the keys of `capture` and the maps."""
        return [block.name for block in self._blocks]

    def text_projections(self) -> list[str]:
        """The names of the layers that make the text's keys and values."""
        layers = {id(layer) for _, _, attn in self._over_text for layer in (attn.to_k, attn.to_v)}
        return [name for name, layer in self.named_modules() if id(layer) in layers]

    def set_plan(self, plan: str | Sequence[str] | dict[str, str]) -> UNet:
        """Set the memory plan of the layers.

        Args:
            plan: one name for all layers, one per layer of `layers()`, or names by leading part of the layers' names
                (the longest part counts; "" is all others). Names as in plans.PLAN_NAMES, short or long.

        Returns:
            The UNet itself.
        """
        layers = self.layers()
        if isinstance(plan, dict):
            unknown = [key for key in plan if not any(name.startswith(key) for name in layers)]
            if unknown:
                raise ValueError(f"the memory plan names {unknown[0]!r}, but no layer's name starts with it")
            chosen = []
            for name, layer in layers.items():
                key = max((key for key in plan if name.startswith(key)), key=len, default=None)
                chosen.append(layer.plan if key is None else plan[key])
        else:
            chosen = [plan] * len(layers) if isinstance(plan, str) else list(plan)
            if len(chosen) != len(layers):
                raise ValueError(f"the memory plan lists {len(chosen)} layers; this UNet has {len(layers)}")
        for layer, name in zip(layers.values(), [short_plan(p) for p in chosen], strict=True):
            layer.plan = name
        return self

    def derived(self) -> list[Tensor]:
        """Tensors made once from frozen weights and kept beside them, on the CPU."""
        kernels = [m.upsampled.kernels for m in self.modules() if isinstance(m, Resample)]
        return [k for k in kernels if k is not None]

    def forget_derived(self) -> None:
        """Drop what was made from frozen weights: where these train or wait, it would stay in memory beside them."""
        for module in self.modules():
            if isinstance(module, Resample):
                module.upsampled.forget()
            elif isinstance(module, Conv2d):
                module.forget()
        self._time_stack.forget()
        self._kv_stack.forget()
        if self.ring is not None:
            self.ring.forget()

    def stacks(self) -> tuple[Stack, Stack]:
        """The layers that read the time's embedding, and those that read the text: few products each."""
        return self._time_stack, self._kv_stack

    def join_layers(self, on: bool) -> None:
        """Compute layers that read the same input as one product, or one by one."""
        self._time_stack.apart = self._kv_stack.apart = not on

    def projection(self, name: str) -> Linear | Conv2d:
        """The layer `name` that a low-rank residual may go on; ValueError where it is another kind of layer."""
        layer = self.get_submodule(name)
        spatial = isinstance(layer, Conv2d) and not name.endswith((".proj_in", ".proj_out"))
        if not isinstance(layer, (Linear, Conv2d)) or spatial:
            raise ValueError(f"{name} is not a projection: low-rank residuals go on linear layers, proj_in, proj_out")
        return layer

    def attach(self, name: str, residual: LowRank) -> LowRank:
        """Put a low-rank residual on the projection `name`; it is not part of the state dict."""
        layer = self.projection(name)
        c_out, c_in = layer.weight.shape[:2]
        if residual.down.shape[-1] != c_in or residual.up.shape[-2] != c_out:
            shapes = f"down {tuple(residual.down.shape)}, up {tuple(residual.up.shape)}"
            raise ValueError(f"{name} maps {c_in} to {c_out} channels; the residual's {shapes} do not fit")
        layer.residuals.append(residual)
        return residual

    def detach(self, key: str | None = None) -> None:
        """Take the residuals of the concept `key` off every projection, or all of them."""
        for layer in self.modules():
            if isinstance(layer, (Linear, Conv2d)):
                layer.residuals = [r for r in layer.residuals if key is not None and r.key != key]

    @alone
    def text_kv(self, context: Tensor | dict[str, Tensor]) -> TextKV:
        """Every block's keys and values of the text, as one product; while the text is frozen, once a run is enough.

        Args:
            context: text states [B, T, C], or by block (`attention_names()`) where each has its own.

        Returns:
            Keys and values [B, T, C] by block, for `forward`; those of a first attention that is over the text too
            stand under the block's name with ".attn1".
        """
        states = context.values() if isinstance(context, dict) else [context]
        width = self.settings["cross_attention_dim"]
        for state in states:
            if state.dim() != 3 or state.shape[-1] != width:
                raise ValueError(f"context must be [B, T, {width}] for this model, not {tuple(state.shape)}")
        if isinstance(context, dict):
            return {
                name: (attn.to_k(context[block]), attn.to_v(context[block])) for name, block, attn in self._over_text
            }
        parts = self._kv_stack(context)
        return {name: (parts[2 * i], parts[2 * i + 1]) for i, (name, _, _) in enumerate(self._over_text)}

    def embedding(self, t: Tensor | float, x: Tensor, added: dict[str, Tensor] | None) -> Tensor:
        """The embedding [B, c_time] of the timestep, and of the class or of SDXL's pooled text and sizes."""
        c, added = self.settings, added or {}
        t = torch.as_tensor(t, device=x.device).reshape(-1).expand(x.shape[0])  # [B]
        wave = (c["flip_sin_to_cos"], c["freq_shift"])
        e = self.time_embedding(sinusoid(t, c["block_out_channels"][0], *wave).to(x.dtype))  # [B, c_time]
        needed = ["class_labels"] * bool(self.class_embedding) + ["text_embeds", "time_ids"] * bool(self.add_embedding)
        missing = [key for key in needed if key not in added]
        if missing:
            raise ValueError(f'this UNet needs added={{"{missing[0]}": ...}} (its configuration says so)')
        if self.class_embedding is not None:
            e = e + self.class_embedding(added["class_labels"]).to(x.dtype)  # [B, c_time]
        if self.add_embedding is not None:
            ids = sinusoid(added["time_ids"].flatten(), c["addition_time_embed_dim"], *wave)
            ids = ids.reshape(x.shape[0], -1).to(x.dtype)  # [B, 6 * width of one]
            e = e + self.add_embedding(torch.cat([added["text_embeds"].to(x.dtype), ids], dim=-1))  # [B, c_time]
        return e

    @alone
    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | TextKV,
        added: dict[str, Tensor] | None = None,
        capture: Tensor | dict[str, Tensor] | None = None,
        masks: MaskOf | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Predict from noisy latents.

        Args:
            x: noisy latents [B, C, H, W].
            t: timesteps, one or [B].
            context: text states [B, T, C], or `text_kv(states)`.
            added: SDXL's "text_embeds" [B, C] and "time_ids" [B, 6]; "class_labels" [B] where the model has classes.
            capture: token weights [B, G, T], for all blocks or by block name.
            masks: called with a block's name and its maps (None before they exist); returns the mask of the residuals
                that follow in that block, [B, N] or by the residual's `key`.

        Returns:
            The prediction [B, C, H, W]; with `capture` a pair of it and the maps [B, G, N] by block name.
        """
        if x.dim() != 4 or x.shape[1] != self.settings["in_channels"]:
            wanted = f"[B, {self.settings['in_channels']}, H, W]"
            raise ValueError(f"x must be {wanted} for this model, not {tuple(x.shape)}")
        call = Conditioning(context if isinstance(context, dict) else self.text_kv(context), capture, masks)
        times = iter(self._time_stack(F.silu(self.embedding(t, x, added))))
        found: dict[str, Tensor] = {}

        def layer(level: Level, i: int, h: Tensor) -> Tensor:
            h = level.resnets[i](h, next(times))
            if i < len(level.attentions):
                h, maps = level.attentions[i](h, call)
                blocks = level.attentions[i].transformer_blocks
                found.update({b.name: m for b, m in zip(blocks, maps, strict=True) if m is not None})
            return h

        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))  # [B, C, H, W]
        skips = [h]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                h = layer(level, i, h)
                skips.append(h)
            for resample in level.downsamplers:
                h = resample(h)
                skips.append(h)
        if self.mid_block is not None:
            h = self.mid_block.resnets[1](layer(self.mid_block, 0, h), next(times))
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                h = layer(level, i, torch.cat([h, skips.pop()], dim=1))  # [B, C, H, W]
            for resample in level.upsamplers:
                h = resample(h, skips[-1].shape[2:])
        keep = direct if self._resnets[-1].plan == "eager" else rebuilt
        y = keep(self.conv_norm_out, h, then=self.conv_out)  # [B, C, H, W]
        return (y, found) if capture is not None else y
