"""An autoencoder's layers over large pictures in bands of rows: the same numbers but for rounding, in less memory.

The layers with the most positions make several tensors of half a gigabyte each for one picture of 1024 x 1024 in
float32. In bands there are two: a block's input, which also takes its output, and what is between its convolutions.

Letters: P images, C channels, G groups of them, H x W positions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WHOLE = 512 * 512  # positions up to which a picture is worked on whole
_LOCK = threading.RLock()
BAND = 1 << 16  # positions of a band: 34 MB of 128 channels in float32


@contextmanager
def in_bands(vae: nn.Module, positions: int) -> Iterator[None]:
    """Let an autoencoder of diffusers work on pictures of more than WHOLE positions in bands, without gradients.

    One that somebody has put hooks or other layers into works whole, as they expect it; one thread at a time.
    """
    if positions <= WHOLE:
        yield
        return
    changed: list[nn.Module] = []
    with _LOCK:
        try:
            for module in vae.modules() if _is_plain(vae) else ():
                work = _work_of(module)
                if work is not None:
                    module.forward = partial(_where_large, work, module, module.forward)
                    changed.append(module)
            yield
        finally:
            for module in changed:
                del module.forward


def _is_plain(vae: nn.Module) -> bool:
    """Whether all its modules are as they were made: no hooks, no `forward` of their own, no padding but zeros."""
    for m in vae.modules():
        if "forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks:
            return False
        if isinstance(m, nn.Conv2d) and (type(m) is not nn.Conv2d or m.padding_mode != "zeros"):
            return False
    return all(p.dtype != torch.float64 for p in vae.parameters())


def _work_of(module: Any) -> Callable[[Any, Tensor], Tensor] | None:
    """What does a module's work in bands, for those kinds that autoencoders have of each layer."""
    kind = type(module).__name__ if type(module).__module__.startswith("diffusers.") else ""
    if kind == "ResnetBlock2D":
        plain = module.upsample is None and module.downsample is None and module.time_emb_proj is None
        plain = plain and module.output_scale_factor == 1 and isinstance(module.nonlinearity, nn.SiLU)
        return _resnet if plain and _convolves(module.conv1) and _convolves(module.conv2) else None
    if kind == "Downsample2D":
        plain = module.norm is None and module.use_conv and module.padding == 0
        return _downsample if plain and _convolves(module.conv, 2) else None
    if kind == "Upsample2D":
        plain = module.norm is None and module.use_conv and module.interpolate and not module.use_conv_transpose
        return _upsample if plain and _convolves(module.conv) else None
    return None


def _convolves(conv: Any, stride: int = 1) -> bool:
    """Whether a layer is torch's 3 x 3 convolution with this stride."""
    return type(conv) is nn.Conv2d and (conv.kernel_size, conv.stride) == ((3, 3), (stride, stride))


def _where_large(
    work: Callable[[Any, Tensor], Tensor],
    module: nn.Module,
    whole: Callable[..., Tensor],
    x: Tensor,
    *more: Any,
    **named: Any,
) -> Tensor:
    rows, columns = x.shape[2:]
    given = [value for value in (*more, *named.values()) if value is not None]  # a time or size: here there is none
    if given or torch.is_grad_enabled() or rows * columns <= WHOLE:
        return whole(x, *more, **named)
    return work(module, x)


def bands(rows: int, columns: int) -> list[tuple[int, int]]:
    """(first, behind the last) row of each band."""
    height = max(1, BAND // columns)
    return [(first, min(first + height, rows)) for first in range(0, rows, height)]


def _resnet(block: Any, x: Tensor) -> Tensor:
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))); without a shortcut it is written over x."""
    h = _room(x, block.conv1, *x.shape[2:])  # [P, C, H, W]
    for first, end, part in _convolved(x, block.norm1, block.conv1):
        h[:, :, first:end] = part
    out = x if block.conv_shortcut is None else _room(x, block.conv2, *x.shape[2:])
    for first, end, part in _convolved(h, block.norm2, block.conv2):
        before = x[:, :, first:end]
        out[:, :, first:end] = part + (before if block.conv_shortcut is None else block.conv_shortcut(before))
    return out


def _convolved(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Iterator[tuple[int, int, Tensor]]:
    """conv(silu(norm(x))), band for band: (first row, behind the last, [P, C_out, rows, W])."""
    scale, shift = scale_and_shift(x, norm)
    rows, columns = x.shape[2:]
    for first, end in bands(rows, columns):
        above, below = int(first > 0), int(end < rows)
        part = x[:, :, first - above : end + below].float()
        part = F.silu(part.mul(scale).add_(shift), inplace=True).to(x.dtype)
        yield first, end, _conv(conv, F.pad(part, (1, 1, 1 - above, 1 - below)))


def scale_and_shift(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """norm(x) = x * scale + shift, each [P, C, 1, 1] in float32: moments of each band, joined by Chan's formula."""
    images, channels = x.shape[:2]
    count = 0
    mean = squares = torch.zeros(images, norm.num_groups, device=x.device)  # [P, G]
    for first, end in bands(*x.shape[2:]):
        part = x[:, :, first:end].float().reshape(images, norm.num_groups, -1)  # [P, G, n]
        n = part.shape[-1]
        variance, its = torch.var_mean(part, dim=-1, correction=0)
        apart = its - mean
        squares = squares + variance * n + apart.square() * (count * n / (count + n))
        mean = mean + apart * (n / (count + n))
        count += n
    size = torch.rsqrt(squares / count + norm.eps)  # [P, G]
    each = channels // norm.num_groups
    scale = size.repeat_interleave(each, 1) * norm.weight.float()  # [P, C]
    shift = norm.bias.float() - mean.repeat_interleave(each, 1) * scale
    return scale[..., None, None], shift[..., None, None]


def _room(x: Tensor, conv: nn.Conv2d, rows: int, columns: int) -> Tensor:
    """Where a convolution's output goes, in x's order of memory."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    order = torch.channels_last if last else torch.contiguous_format
    shape = x.shape[0], conv.out_channels, rows, columns
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)


def _conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of what is padded already."""
    return F.conv2d(x, conv.weight, conv.bias, conv.stride)


def _downsample(module: Any, x: Tensor) -> Tensor:
    """A 3 x 3 convolution of every second position, with a row and a column of zeros at the end."""
    rows, columns = ((size + 1 - 3) // 2 + 1 for size in x.shape[2:])
    out = _room(x, module.conv, rows, columns)
    for first, end in bands(rows, 2 * columns):
        last = 2 * end + 1  # behind the last row that is read
        part = F.pad(x[:, :, 2 * first : last], (0, 1, 0, max(0, last - x.shape[2])))
        out[:, :, first:end] = _conv(module.conv, part)
    return out


def _upsample(module: Any, x: Tensor) -> Tensor:
    """Every position twice along both sides, then a 3 x 3 convolution."""
    rows, columns = x.shape[2:]
    out = _room(x, module.conv, 2 * rows, 2 * columns)
    for first, end in bands(rows, 4 * columns):
        above, below = int(first > 0), int(end < rows)
        part = F.interpolate(x[:, :, first - above : end + below], scale_factor=2.0, mode="nearest")
        part = part[:, :, above : part.shape[2] - below]  # one row beyond the band on each side
        out[:, :, 2 * first : 2 * end] = _conv(module.conv, F.pad(part, (1, 1, 1 - above, 1 - below)))
    return out
