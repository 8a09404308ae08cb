"""What the host tells Triton kernels about their operands: alignment, strides, limits; and sums of partial results."""

from __future__ import annotations

from torch import Tensor

from ._launch import blocks, launch, pow2
from ._layout import rows_far_apart
from ._math import LOG2E, sum_partials_kernel

LOG2_E: float = LOG2E.value  # the kernels' constant on the host's side
SUM_TILE = 2048  # elements of a tile of partial sums: 16 loads a thread, all under way at once
MAX_WIDTH = 256  # of a head: the widest row of the tile tables (Stable Diffusion's widest head has 160)


def sum_config(count: int, n: int) -> dict[str, int]:
    """The tile of `sum_partials`: slots x elements.

    It depends on the sizes alone, so that every card adds in the same order. Few elements are cut into sectors of
    memory, 8 floats, and their slots shared out among the threads: with a program for 256 elements, GroupNorm's
    backward at 64x64 had 2 of them, which read 128 slots an image one after another.

    Args:
        count: slots that are added to each element.
        n: elements of a slot.

    Returns:
        The kernel's constexprs, `num_warps` and `num_stages`.
    """
    block_n = 8 if n <= 2048 else 32
    block_s = min(pow2(count), SUM_TILE // block_n)
    block_n = max(block_n, SUM_TILE // 4 // block_s)  # 4 a thread at least
    return {"BLOCK_S": block_s, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}


def sum_partials(part: Tensor, out: Tensor, owner: Tensor | None = None) -> Tensor:
    """part [S, n...] fp32 summed over S into contiguous out [n...], always in the same order.

    With owner [B] int64, S = B * per_owner slots belong to B samples, and out [K, n...] sums those of each owner.
    """
    count = part.shape[0]
    owners = 1 if owner is None else out.shape[0]
    n = part.numel() // count
    per_owner = 1 if owner is None else count // owner.shape[0]
    config = sum_config(count, n)
    tensors = part, part if owner is None else owner, out
    grid = (blocks(n, config["BLOCK_N"]), owners)
    launch(sum_partials_kernel, grid, *tensors, n, count, per_owner, HAS_OWNER=owner is not None, **config)
    return out


def common_align(*tensors: Tensor | None) -> int:
    """8 where every row starts on a multiple of 8 elements, so that 16-byte loads are possible; else 1."""
    wide = all(s % 8 == 0 for t in tensors if t is not None for s in t.stride()[:-1])
    return 8 if wide else 1


def strides(x: Tensor | None, align: int) -> tuple[int, ...]:
    """The strides but the last, in units of `align`: the kernel multiplies them back and so knows the alignment."""
    return (0, 0, 0) if x is None else tuple(s // align for s in x.stride()[:-1])


def width_reason(width: int) -> str | None:
    """Why the attention kernels cannot take heads of this width, or None."""
    return f"head width {width} is above {MAX_WIDTH}; use the reference" if width > MAX_WIDTH else None


def head_reason(*tensors: Tensor) -> str | None:
    """Why the attention kernels cannot take these [B, H, N, D] tensors of one width, or None."""
    too_wide = width_reason(tensors[0].shape[3])
    if too_wide:
        return too_wide
    for x in tensors:
        if rows_far_apart(x):
            return "the rows of one head lie 2^31 or more elements apart. Fix: .contiguous(), or use the reference"
    return None
