"""The blocks of the UNet: residual blocks, transformers, changes of resolution; each follows its memory plan.

Letters: B batch, C channels, H x W image, N = H W tokens (positions), G capture groups, T text tokens, A attention
heads, D width of a head. An image [B, C, H, W] is channels-last, so its tokens [B, N, C] are the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from pcs_kernels import cross_attention, geglu, self_attention

from .layers import Conv2d, GroupNorm, LayerNorm, Linear, Masks, keeps_input, project, trained
from .recompute import direct, rebuilt
from .upsample import UpsampledConv

TextKV = dict[str, tuple[Tensor, Tensor]]
MaskOf = Callable[[str, Tensor | None], Masks]  # (a block's name, its maps or None before they exist) -> masks
Module = TypeVar("Module", bound=nn.Module)


def module_list(modules: Iterable[Module]) -> Sequence[Module]:
    """An nn.ModuleList whose elements keep their type."""
    return cast("Sequence[Module]", nn.ModuleList(modules))


@dataclass
class Conditioning:
    """What one call brings to every transformer block: text keys and values, tokens to capture, residual masks."""

    kv: TextKV
    capture: Tensor | dict[str, Tensor] | None = None
    masks: MaskOf | None = None

    def captured(self, name: str) -> Tensor | None:
        """The token weights [B, G, T] to capture in a block, if any."""
        return self.capture.get(name) if isinstance(self.capture, dict) else self.capture


def tokens(x: Tensor) -> Tensor:
    """An image as tokens, without a copy."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, C]


def same(*results: Any) -> Any:
    """The results as they are: what follows a body that is computed again as a whole."""
    return results[0] if len(results) == 1 else results


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after a norm with SiLU, around the time embedding; added to the input."""

    def __init__(self, c_in: int, c_out: int, c_time: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps)
        self.conv1 = Conv2d(c_in, c_out, 3)
        self.time_emb_proj = Linear(c_time, c_out)
        self.norm2 = GroupNorm(groups, c_out, eps)
        self.conv2 = Conv2d(c_out, c_out, 3)
        self.conv_shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else None
        self.plan = "eager"

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, C_in, H, W] and this block's projection of the time embedding [B, C_out] -> [B, C_out, H, W]."""
        if self.plan == "checkpoint":
            return rebuilt(lambda x, time: self.body(x, time, direct), x, time, then=same, whole=True)
        return self.body(x, time, direct if self.plan == "eager" else rebuilt)

    def body(self, x: Tensor, time: Tensor, keep: Callable) -> Tensor:
        h = keep(self.norm1, x, then=self.conv1) + time[:, :, None, None]  # [B, C_out, H, W]
        h = keep(self.norm2, h, then=self.conv2)  # [B, C_out, H, W]
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))  # [B, C_out, H, W]


class Attention(nn.Module):
    """Projections of an attention over tokens, or over the text where `c_text` is given."""

    def __init__(self, width: int, heads: int, c_text: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(c_text or width, width, bias=False)
        self.to_v = Linear(c_text or width, width, bias=False)
        self.to_out = module_list([Linear(width, width)])

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, A, N, D]

    def qkv(self, x: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.to_q(x, masks)), self.split(self.to_k(x, masks)), self.split(self.to_v(x, masks))

    def out(self, x: Tensor, masks: Masks) -> Tensor:
        return self.to_out[0](x.transpose(1, 2).flatten(2), masks)  # [B, N, C]


class GatedProjection(nn.Module):
    """The feed-forward's first projection, of values and gates."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.proj = Linear(c_in, c_out)


class FeedForward(nn.Module):
    """A projection to values and gates, their product, and the projection back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [GatedProjection(width, 8 * width), nn.Identity(), Linear(4 * width, width)]
        self.net = cast("tuple[GatedProjection, nn.Identity, Linear]", nn.ModuleList(layers))

    def up(self, x: Tensor, masks: Masks) -> Tensor:
        return self.net[0].proj(x, masks)  # [B, N, 8 C]

    def down(self, x: Tensor, masks: Masks) -> Tensor:
        return self.net[2](x, masks)  # [B, N, C] from [B, N, 4 C]

    def halves(self, masks: Masks) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """What a plan computes again and what follows it: the gate is in the first where a trained `down` needs it."""
        if keeps_input(self.net[2]):
            return (lambda n: geglu(self.up(n, masks))), (lambda g: self.down(g, masks))
        return (lambda n: self.up(n, masks)), (lambda p: self.down(geglu(p), masks))


class TransformerBlock(nn.Module):
    """Self-attention, attention over the text, feed-forward; each added to the hidden state h [B, N, C].

    With `only_cross` the first attention is over the text too: an up-scaler's large images have too many positions for
    attention among them.
    """

    def __init__(self, width: int, heads: int, c_text: int, only_cross: bool) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.norm1, self.norm2, self.norm3 = LayerNorm(width), LayerNorm(width), LayerNorm(width)
        self.attn1 = Attention(width, heads, c_text if only_cross else None)
        self.attn2 = Attention(width, heads, c_text)
        self.ff = FeedForward(width)
        self.name = ""

    def over_text(self) -> list[tuple[str, Attention]]:
        """The attentions over the text, by the names that their keys and values have in a TextKV."""
        first = [(f"{self.name}.attn1", self.attn1)] if self.only_cross else []
        return [(self.name, self.attn2), *first]

    def forward(
        self, h: Tensor, kv: Sequence[Tensor], call: Conditioning, plan: str
    ) -> tuple[Tensor, Tensor | None, Masks]:
        """One block under a plan.

        Args:
            h: hidden state [B, N, C].
            kv: keys and values of the text [B, T, C], of each attention of `over_text()` in turn.
            call: what the call captures and masks.
            plan: short name of the memory plan.

        Returns:
            The hidden state, the captured maps [B, G, N], and the masks of this block's residuals.
        """
        masks = None if call.masks is None else call.masks(self.name, None)
        keep = direct if plan == "eager" else rebuilt
        k, v, *first = kv
        o = self.first(h, first, masks, plan, keep)
        if plan == "C":
            return rebuilt(
                lambda o, h, k, v: self.rest(o, h, k, v, call, masks), o, h, k, v, then=self.close, whole=True
            )
        h, maps, masks = self.attended(o, h, k, v, call, masks, keep)
        if plan == "B":
            again, close = self.ff.halves(masks)
            return h + rebuilt(lambda h: again(self.norm3(h)), h, then=close, whole=True), maps, masks
        p = keep(self.norm3, h, then=lambda n: self.ff.up(n, masks))  # [B, N, 8 C]
        return h + keep(geglu, p, then=lambda g: self.ff.down(g, masks)), maps, masks

    def first(self, h: Tensor, kv: Sequence[Tensor], masks: Masks, plan: str, keep: Callable) -> Tensor:
        """The first attention's output o [B, A, N, D], of h among its own tokens or over the text's keys and values."""
        attn = self.attn1
        if not self.only_cross:
            if plan == "C":
                return rebuilt(lambda h: attn.qkv(self.norm1(h), masks), h, then=self_attention, whole=True)
            return self_attention(*keep(self.norm1, h, then=lambda n: attn.qkv(n, masks)))

        def over(q: Tensor) -> Tensor:
            return cross_attention(q, attn.split(kv[0]), attn.split(kv[1]), None)[0]

        if plan == "C":
            return rebuilt(lambda h: attn.split(attn.to_q(self.norm1(h), masks)), h, then=over, whole=True)
        return over(keep(self.norm1, h, then=lambda n: attn.split(attn.to_q(n, masks))))

    def attended(
        self, o: Tensor, h: Tensor, k: Tensor, v: Tensor, call: Conditioning, masks: Masks, keep: Callable
    ) -> tuple[Tensor, Tensor | None, Masks]:
        """The first attention's output o [B, A, N, D] added to h, then the attention over the text."""
        attn = self.attn2
        h = h + self.attn1.out(o, masks)  # [B, N, C]
        q = keep(self.norm2, h, then=lambda n: attn.split(attn.to_q(n, masks)))  # [B, A, N, D]
        o, maps = cross_attention(q, attn.split(k), attn.split(v), call.captured(self.name))
        masks = None if call.masks is None else call.masks(self.name, maps)
        return h + attn.out(o, masks), maps, masks

    def rest(self, o: Tensor, h: Tensor, k: Tensor, v: Tensor, call: Conditioning, masks: Masks) -> tuple:
        """All that plan C computes again after the first attention's output o."""
        h, maps, masks = self.attended(o, h, k, v, call, masks, direct)
        return self.ff.halves(masks)[0](self.norm3(h)), h, maps, masks

    def close(self, p: Tensor, h: Tensor, maps: Tensor | None, masks: Masks) -> tuple[Tensor, Tensor | None, Masks]:
        return h + self.ff.halves(masks)[1](p), maps, masks


class Transformer(nn.Module):
    """Transformer blocks over an image's tokens, between a norm with projection and a projection back; added to it."""

    def __init__(
        self, width: int, heads: int, depth: int, c_text: int, groups: int, linear: bool, only_cross: bool = False
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, width, 1e-6)  # diffusers' value here, whatever norm_eps is
        self.proj_in = Linear(width, width) if linear else Conv2d(width, width, 1)
        self.transformer_blocks = module_list(
            [TransformerBlock(width, heads, c_text, only_cross) for _ in range(depth)]
        )
        self.proj_out = Linear(width, width) if linear else Conv2d(width, width, 1)
        self.plan = "eager"

    def forward(self, x: Tensor, call: Conditioning) -> tuple[Tensor, list[Tensor | None]]:
        """x [B, C, H, W] -> (the image [B, C, H, W], each block's captured maps [B, G, N])"""
        kv = [part for block in self.transformer_blocks for name, _ in block.over_text() for part in call.kv[name]]
        if self.plan == "checkpoint":
            y, *maps = rebuilt(lambda *kept: self.body(*kept, call=call, plan="eager"), x, *kv, then=same, whole=True)
        else:
            y, *maps = self.body(x, *kv, call=call, plan=self.plan)
        return y, maps

    def body(self, x: Tensor, *kv: Tensor, call: Conditioning, plan: str) -> tuple[Any, ...]:
        keep = direct if plan == "eager" else rebuilt
        h = keep(lambda x: tokens(self.norm(x, None)), x, then=lambda n: project(self.proj_in, n))  # [B, N, C]
        captured: list[Tensor | None] = []
        masks: Masks = None
        each = len(kv) // len(self.transformer_blocks)
        for i, block in enumerate(self.transformer_blocks):
            h, maps, masks = block(h, kv[i * each : (i + 1) * each], call, plan)
            captured.append(maps)
        y = project(self.proj_out, h, masks)  # [B, N, C]
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2) + x, *captured  # [B, C, H, W], [B, G, N]


class Resample(nn.Module):
    """The 3x3 convolution that halves the image, or that follows its upsampling."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, stride)
        self.upsampled = UpsampledConv()
        self.plan = "eager"

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """x [B, C, H, W] -> half of it, or with `size` (height, width) that."""
        if size is None:
            return self.conv(x)  # [B, C, H / 2, W / 2]
        if x.device.type == "cpu" and not trained(self.conv) and list(size) == [2 * s for s in x.shape[2:]]:
            return self.upsampled(self.conv, x)  # [B, C, 2 H, 2 W]
        keep = direct if self.plan == "eager" else rebuilt
        return keep(lambda x: F.interpolate(x, size=tuple(size), mode="nearest"), x, then=self.conv)  # [B, C, *size]


class Level(nn.Module):
    """Resnets, each followed by its transformer where the level has them, and a change of resolution."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[Transformer], down: bool, up: bool) -> None:
        super().__init__()
        width = resnets[-1].conv2.out_channels
        self.resnets = module_list(resnets)
        self.attentions = module_list(attentions)
        self.downsamplers = module_list([Resample(width, 2)] if down else [])
        self.upsamplers = module_list([Resample(width, 1)] if up else [])
