"""The UNet's projections and norms: torch's modules and names, on the ops of pcs_kernels.

A frozen weight goes through the frozen ops and keeps nothing; a trained one through torch's; one with low-rank
residuals attached through `lowrank_residual`. Which of them a layer needs is read from the layer at every call.

Letters: B batch, N tokens, C channels, H x W image, R rank of a residual, K residuals of a stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version

import pcs_kernels
from pcs_kernels import Int8Weight, StreamedWeight
from pcs_kernels.streaming import FrozenWeight, on_the_host

Masks = Tensor | dict[str, Tensor] | None


@dataclass(eq=False)
class LowRank:
    """A low-rank residual on one projection: scale * (x down^T) up^T, or a stack of them with an index per image.

    `key` names the concept it belongs to: a mask for that concept alone is given under this name.
    """

    down: Tensor  # [R, C_in] or [K, R, C_in]
    up: Tensor  # [C_out, R] or [K, C_out, R]
    scale: float = 1.0
    index: Tensor | None = None  # [B] into the K of a stack
    key: str = ""

    def mask_of(self, masks: Masks) -> Tensor | None:
        """The mask [B, N] of this residual, if there is one."""
        return masks.get(self.key) if isinstance(masks, dict) else masks

    def __call__(self, x: Tensor, masks: Masks) -> Tensor:
        """The residual alone, for the second and further concepts on a projection."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if self.index is not None:
            down, up = down[self.index], up[self.index]  # [B, R, C_in], [B, C_out, R]
        y = (x @ down.mT) @ up.mT * self.scale  # [B, N, C_out]
        mask = self.mask_of(masks)
        return y if mask is None else y * mask[..., None].to(y.dtype)  # [B, N, C_out]


def replace_data(parameter: Tensor, value: Tensor) -> None:
    """Replace `parameter.data` and bump its version, so that packed copies of its values are invalidated."""
    parameter.data = value
    increment_version(parameter)


def place(p: nn.Parameter, value: Tensor) -> None:
    """Give a parameter that no optimizer has seen yet a value elsewhere."""
    if torch._has_compatible_shallow_copy_type(p, value):  # as torch's own Module.to asks
        replace_data(p, value)
    else:
        torch.utils.swap_tensors(p, nn.Parameter(value, requires_grad=p.requires_grad))


def laid_out_as(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """The value on the parameter's device, in its dtype and its order of memory; itself where nothing differs."""
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    if parameter.dim() != 4 or parameter.is_contiguous():
        return value
    last = parameter.is_contiguous(memory_format=torch.channels_last)
    return value.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def masks_all(mask: Tensor | None) -> bool:
    """Whether a mask is all zero. CPU only: on a GPU the answer would force a synchronization at every projection."""
    return mask is not None and mask.device.type == "cpu" and not bool(mask.any())


def trained(layer: nn.Module) -> bool:
    """Whether any of the layer's own parameters trains."""
    # asked several times for each layer in a step, where `layer.parameters()` would be a tenth of its host time
    return True in [p.requires_grad for p in layer._parameters.values() if p is not None]


def keeps_input(layer: Linear | Conv2d) -> bool:
    """Whether the layer's own gradients need its input."""
    return trained(layer) or any(r.down.requires_grad or r.up.requires_grad for r in layer.residuals)


def project(layer: Linear | Conv2d, x: Tensor, masks: Masks = None) -> Tensor:
    """A linear layer, or a 1x1 convolution as one, with the residuals attached to it.

    Args:
        layer: the projection.
        x: tokens [B, N, C_in].
        masks: of its residuals: [B, N] for all, or by the residual's `key`.

    Returns:
        [B, N, C_out]. A residual whose mask is all zero is left out, so the result is the base layer's, bit for bit.
    """
    shown = [r for r in layer.residuals if not masks_all(r.mask_of(masks))]
    if shown:
        first, *rest = shown
        weight, bias = _cast(layer, x)
        y = pcs_kernels.lowrank_residual(
            x, weight, bias, first.down, first.up, first.mask_of(masks), first.scale, first.index
        )  # [B, N, C_out]
        for residual in rest:
            y = y + residual(x, masks)  # [B, N, C_out]
        return y
    if trained(layer) and layer.streamed is None:
        weight, bias = _cast(layer, x)
        return pcs_kernels.trained_linear(x, weight.flatten(1), bias)  # [B, N, C_out]
    return pcs_kernels.frozen_linear(x, layer.matrix(), layer.bias)  # [B, N, C_out]


def held(layer: Linear | Conv2d) -> Tensor | Int8Weight | StreamedWeight:
    """The layer's weight as the frozen ops take it: itself, its codes and scales, or where it is streamed from."""
    if layer.streamed is not None:
        if layer.streamed.sources[0] is not layer.weight:
            raise RuntimeError(
                "a streamed weight was replaced by another parameter. Fix: write the values into it, as "
                "load_state_dict does without assign=True"
            )
        return layer.streamed
    return layer.weight if layer.weight_scales is None else Int8Weight(layer.weight, layer.weight_scales)


def device_of(layer: Linear | Conv2d) -> torch.device:
    """Where a layer computes."""
    return layer.weight.device if layer.streamed is None else layer.streamed.ring.device


def _cast(layer: Linear | Conv2d | LayerNorm, x: Tensor) -> tuple[Any, Tensor | None]:
    """The weights in x's dtype, or in 8 bits: a trained one may be a float32 master in a bfloat16 network."""
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, (Linear, Conv2d)) and (weight.dtype is torch.int8 or layer.streamed is not None):
        return held(layer), None if bias is None else bias.to(x.dtype)
    if weight.dtype is x.dtype and (bias is None or bias.dtype is x.dtype):
        return weight, bias
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


class Linear(nn.Linear):
    """torch's Linear on our ops; `residuals` holds the low-rank residuals attached to it."""

    def __init__(self, c_in: int, c_out: int, bias: bool = True) -> None:
        super().__init__(c_in, c_out, bias)
        self.residuals: list[LowRank] = []
        self.weight_scales: nn.Parameter | None
        self.register_parameter("weight_scales", None)  # of a weight in 8 bits
        self.original: Callable[[], Tensor] | None = None  # reads such a weight as it was
        self.streamed: StreamedWeight | None = None  # where the weight waits in the machine's memory

    def matrix(self) -> Tensor | Int8Weight | StreamedWeight:
        """The weight [C_out, C_in]."""
        return held(self)

    def forward(self, x: Tensor, masks: Masks = None) -> Tensor:
        return project(self, x, masks)


class Conv2d(nn.Conv2d):
    """torch's square Conv2d on our ops; a 1x1 one can be used as a projection of tokens."""

    padding: tuple[int, ...]

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(c_in, c_out, kernel, stride, padding=kernel // 2)
        self.residuals: list[LowRank] = []
        self.weight_scales: nn.Parameter | None
        self.register_parameter("weight_scales", None)  # of a weight in 8 bits
        self.original: Callable[[], Tensor] | None = None  # reads such a weight as it was
        self.streamed: StreamedWeight | None = None  # where the weight waits in the machine's memory
        self._matrix: tuple[tuple[int, int], Tensor] | None = None

    def matrix(self) -> Tensor | Int8Weight | StreamedWeight:
        """A frozen 1x1 weight as [C_out, C_in]: one tensor for as long as the weight is the same, so it packs once."""
        weight = self.weight
        if self.streamed is not None:
            return held(self)
        if self.weight_scales is not None:
            return Int8Weight(weight.detach().flatten(1), self.weight_scales)
        seen = pcs_kernels.weight_version(weight)
        if self._matrix is None or self._matrix[0] != seen:
            self._matrix = (seen, weight.detach().flatten(1))
        return self._matrix[1]

    def forget(self) -> None:
        """Drop the weight that `matrix` keeps."""
        self._matrix = None

    def forward(self, x: Tensor) -> Tensor:
        if trained(self) and self.streamed is None:
            weight, bias = _cast(self, x)
            return pcs_kernels.trained_conv2d(x, weight, bias, self.stride[0], self.padding[0])  # [B, C_out, H, W]
        return pcs_kernels.frozen_conv2d(x, held(self), self.bias, self.stride[0], self.padding[0])  # [B, C_out, H, W]


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm, with or without the SiLU that follows it."""

    def forward(self, x: Tensor, activation: str | None = "silu") -> Tensor:
        return pcs_kernels.group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, activation)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _cast(self, x)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Stack:
    """Frozen layers that read the same input, as few products.

    Their weights become views of few matrices, so it costs no memory; a weight that was replaced or written to since is
    stacked again. Layers that train or carry residuals are computed one by one.

    Args:
        layers: those layers.
        most: weights in one product: what is streamed passes through a ring that is made for the largest layer.
    """

    def __init__(self, layers: Sequence[Linear], most: int) -> None:
        self.layers = list(layers)
        self.groups = grouped(self.layers, most)
        self.apart = False  # compute the layers one by one
        self._seen: list[tuple[int, int]] = []
        # of each group [sum of its widths, C_in], and [sum of its widths]
        self._made: list[tuple[FrozenWeight, Tensor | None]] = []

    def refresh(self) -> None:
        """Join what was not joined yet, or has changed since."""
        tensors = [p for layer in self.layers for p in (layer.weight, layer.weight_scales, layer.bias) if p is not None]
        if self._seen and self._seen == [pcs_kernels.weight_version(p) for p in tensors]:
            return
        self.forget()
        with torch.inference_mode(False), torch.no_grad():
            self._made = [_join(group) for group in self.groups]
        self._seen = [pcs_kernels.weight_version(p) for p in tensors]

    def forget(self) -> None:
        """Drop the matrices; layers that still are views of them keep them."""
        streamed = [weight for weight, _ in self._made if isinstance(weight, StreamedWeight)]
        if streamed:
            streamed[0].ring.drop(*streamed)
        self._seen, self._made = [], []

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Each layer's output for x [..., C_in], in the order of the layers."""
        if self._seen and any(trained(layer) for layer in self.layers):
            self.forget()
        apart = any(trained(layer) or layer.residuals for layer in self.layers)
        kinds = {(layer.weight.dtype, layer.streamed is None) for layer in self.layers}
        if apart or self.apart or len(kinds) > 1:
            return [layer(x) for layer in self.layers]
        self.refresh()
        found: list[Tensor] = []
        for group, (weight, bias) in zip(self.groups, self._made, strict=True):
            found += pcs_kernels.frozen_linear(x, weight, bias).split([layer.out_features for layer in group], dim=-1)
        return found


def grouped(layers: Sequence[Linear], most: int) -> list[list[Linear]]:
    """Layers in their order, in groups of at most so many weights; a larger layer is a group of its own."""
    groups: list[list[Linear]] = []
    room = 0
    for layer in layers:
        size = layer.in_features * layer.out_features
        if size > room:
            groups.append([])
            room = most
        groups[-1].append(layer)
        room -= size
    return groups


def _join(layers: Sequence[Linear]) -> tuple[FrozenWeight, Tensor | None]:
    """(the weights of some layers as one, their biases as one)."""
    device, streamed = device_of(layers[0]), layers[0].streamed
    weight = _joined([layer.weight for layer in layers], device)
    scales = [layer.weight_scales for layer in layers if layer.weight_scales is not None]
    parts = (weight, _joined(scales, device)) if scales else (weight,)
    bias = None if layers[0].bias is None else _joined([layer.bias for layer in layers], device)
    if streamed is not None:
        return StreamedWeight(streamed.ring, *parts), bias
    return Int8Weight(*parts) if scales else weight, bias


def _joined(parameters: list[nn.Parameter], device: torch.device) -> Tensor:
    """One tensor holding all of them in order; each parameter becomes a view of its part.

    Parameters in the machine's memory are joined there, for copies to `device`.
    """
    joined = torch.cat([p.detach() for p in parameters])  # [sum of the widths, ...]
    if joined.device != device:
        joined = on_the_host(joined, device)
    for p, part in zip(parameters, joined.split([p.shape[0] for p in parameters]), strict=True):
        p.data = part
    return joined


def sinusoid(t: Tensor, width: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """The sinusoidal embedding of t [B] in fp32 -> [B, width]."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)  # [width / 2]
    # 10000 is the longest period over 2 pi, as in "Attention is all you need" (arXiv 1706.03762)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * steps / (half - freq_shift))  # [B, width / 2]
    halves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(halves, dim=-1), (0, width % 2))  # [B, width]


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.linear_1 = Linear(c_in, c_out)
        self.linear_2 = Linear(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))
