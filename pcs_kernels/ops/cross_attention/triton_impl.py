"""Cross-attention with captured maps in Triton.

B batch, H heads, N queries, T tokens (<= 320), D head width, G captured groups. The forward is one kernel; with a
capture its programs loop over the heads and write each map once. The backward recomputes P: one kernel over query
tiles (dq, and each row's lse and delta), one over blocks of tokens and splits of the queries (dk, dv), then the
splits are added in order.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from ..._launch import (
    KIB,
    SHARED_LIMIT,
    AotCase,
    blocks,
    current_arch,
    launch,
    meta,
    pow2,
    processors,
    record,
    shared_reason,
    split_width,
    stages_that_fit,
    unavailable,
)
from ..._layout import heads_last_empty, unit_rows
from ..._operands import LOG2_E, MAX_WIDTH, common_align, head_reason, strides, sum_partials
from .op import MAX_TOKENS, Needs
from .triton_backward_kernels import cross_bwd_rows_kernel, cross_bwd_tokens_kernel
from .triton_kernels import cross_fwd_kernel

MAX_BLOCK_G = 4  # maps that a program sums at a time: a column of its queries each, in registers


class Kernel(Enum):
    """The kernels that have tiles of their own."""

    FORWARD = "forward"  # a program: a tile of one head's queries
    CAPTURE = "forward with maps"  # a program: a tile of queries, over all heads
    ROWS = "backward over queries"
    TOKENS = "backward over tokens"


class QueryTile(NamedTuple):
    """Queries of a program, for up to so many tokens and heads up to `widest`."""

    tokens: int
    widest: int
    queries: int


class TokenTile(NamedTuple):
    """The queries of one step and the tokens of a program of `Kernel.TOKENS`, for heads up to `widest`."""

    widest: int
    queries: int
    tokens: int
    warps: int


# The first row that fits is taken. A row's reason is what the next larger tile costs, compiled by Triton 3.8 (registers
# and bytes of spilled registers a thread, as in tests/triton_budget.json). A program holds all scores of its queries.
QUERY_TILES = (
    QueryTile(80, 96, 64),  # ROWS at D = 80, T = 77: 248 registers; 128 queries spill 136 on sm_80
    QueryTile(160, 96, 32),  # ROWS at D = 64, T = 154: 224 registers; 64 queries spill 56 on sm_80
    QueryTile(MAX_TOKENS, MAX_WIDTH, 16),  # ROWS at D = 64, T = 320: 250; 32 spill 152, and 32 at D = 160, T = 77
)
TOKEN_TILES = (
    TokenTile(48, 32, 16, 4),  # 178 registers at D = 40; 32 tokens spill 8 on sm_80, 64 queries 8 on sm_86 and sm_120
    TokenTile(64, 32, 32, 4),  # 122 registers
    TokenTile(96, 16, 32, 8),  # 222 registers at D = 80; 32 queries take 252, 64 spill 144 on sm_80
    TokenTile(MAX_WIDTH, 32, 16, 4),  # 166 registers at D = 160; 32 tokens spill 336 on sm_80
)
# The widest head that four warps compute; eight above it. ROWS at D = 160: 168 registers with four, 128 with eight;
# CAPTURE at D = 80: four spill 56 on sm_120.
FOUR_WARPS = {Kernel.FORWARD: MAX_WIDTH, Kernel.ROWS: 96, Kernel.CAPTURE: 64}
# Padded elements of a head's keys up to which CAPTURE loads the next head's keys and values ahead: 12800 (D = 160,
# T = 77) take 59 KiB of shared memory then, 25600 (T = 154) 109 KiB, more than the 99 of sm_86, sm_89 and sm_120.
PREFETCHED = 16384


def launch_config(
    batch: int, heads: int, queries: int, tokens: int, width: int, arch: int, kernel: Kernel, half: bool = True
) -> dict[str, int]:
    """The tiles of a kernel, smaller where few queries would leave multiprocessors idle.

    Args:
        batch: B of the call.
        heads: H.
        queries: N.
        tokens: T.
        width: D.
        arch: a tabled architecture, such as 86.
        kernel: which kernel.
        half: whether the operands have 16 bits.

    Returns:
        The kernel's constexprs, `num_warps` and `num_stages`.
    """
    d0, d1 = split_width(width)
    if kernel is Kernel.TOKENS:
        block = next(t for t in TOKEN_TILES if width <= t.widest)
        block_n = block.queries if half else 16
        block_t = 16 if tokens <= 16 else block.tokens
        tiles = {"BLOCK_N": block_n, "BLOCK_T": block_t, "num_warps": block.warps, "num_stages": 2}
        return tiles | {"D": width, "D0": d0, "D1": d1}
    t0, t1 = split_width(tokens)
    own = next(t.queries for t in QUERY_TILES if tokens <= t.tokens and width <= t.widest) if half else 16
    warps = 4 if width <= FOUR_WARPS[kernel] else 8
    stages, least, programs = 1, 16, batch * heads
    if kernel is Kernel.CAPTURE:
        stages = 2 if (t0 + t1) * (d0 + d1) <= PREFETCHED else 1
        # eight warps share at least 32 queries: with 16, D = 80 spills 8 on sm_80
        least, programs = min(own, 16 if warps == 4 else 32), batch
    while own > least and programs * blocks(queries, own) < processors(arch):
        own //= 2
    # nothing is loaded ahead where it does not fit: D = 160, T = 77 in float32 takes 118 KiB with that and 50 without
    size = 2 if half else 4
    stages = stages_that_fit(stages, arch, lambda s: shared_bound(own, tokens, width, size, kernel, s))
    tiles = {"BLOCK_N": own, "num_warps": warps, "num_stages": stages}
    return tiles | {"D": width, "D0": d0, "D1": d1, "T0": t0, "T1": t1}


def shared_bound(
    own: int, tokens: int, width: int, size: int, kernel: Kernel, stages: int = 1, saves_rows: bool = True
) -> int:
    """The most bytes of shared memory that a kernel over tiles of queries takes; `Kernel.TOKENS` always fits.

    Keys or values of the tokens' first part lie there, beside the queries' tile: of q and dout, of the output or of the
    scores, whichever is largest. A second stage doubles them, for the next head. tests/test_shared_memory.py holds
    this against the compiler: in float32 with one stage it is exact, in 16 bits less is taken.

    Args:
        own: queries of a program.
        tokens: T.
        width: D.
        size: bytes of an element.
        kernel: which kernel.
        stages: of its loads.
        saves_rows: of `Kernel.ROWS`: without its stores the compiler keeps all keys and values to the end.
    """
    columns, row = sum(split_width(tokens)), sum(split_width(width))
    first = split_width(tokens)[0]
    if stages > 1:
        elements = 2 * columns * row + own * (2 * row + columns)
    elif kernel is not Kernel.ROWS:
        elements = first * row + own * max(columns, row)
    elif saves_rows:
        elements = first * row + own * max(first, 2 * row)
    else:
        elements = 2 * columns * row + 2 * own * row
    # from 64 queries on, sm_90 and sm_100 read every operand of a product from there; sm_100 adds its barriers
    return size * elements * (2 if own >= 64 else 1) + KIB


def reason(q: Tensor, k: Tensor, v: Tensor, capture: Tensor | None = None, *_: object) -> str | None:
    why = unavailable(q, dots=True)
    if why is None and k.shape[2] > MAX_TOKENS:
        why = f"{k.shape[2]} tokens are above {MAX_TOKENS}; use self_attention, which takes any number of keys"
    return why or head_reason(q, k, v) or _shared_reason(q, k, current_arch(q.device))


def _shared_reason(q: Tensor, k: Tensor, arch: int) -> str | None:
    """Why the least tiles of forward or backward exceed an architecture's shared memory, or None."""
    tokens, width = k.shape[2], q.shape[3]
    kernels = Kernel.FORWARD, Kernel.CAPTURE, Kernel.ROWS
    needed = max(shared_bound(16, tokens, width, q.element_size(), kernel) for kernel in kernels)
    return shared_reason(needed, arch, f"{tokens} tokens of width {width} in {str(q.dtype)[6:]}")


def _config(q: Tensor, k: Tensor, kernel: Kernel, align: int) -> dict[str, int]:
    arch = current_arch(q.device)
    half = q.dtype != torch.float32
    batch, heads, queries, width = q.shape
    return launch_config(batch, heads, queries, k.shape[2], width, arch, kernel, half) | {"ALIGN": align}


def forward(q: Tensor, k: Tensor, v: Tensor, capture: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    batch, heads, queries, _ = q.shape
    tokens = k.shape[2]
    groups = 0 if capture is None else capture.shape[1]
    align = common_align(q, k, v)
    config = _config(q, k, Kernel.FORWARD if capture is None else Kernel.CAPTURE, align)
    block_g = min(pow2(max(groups, 1)), MAX_BLOCK_G)
    tiles = blocks(queries, config["BLOCK_N"])
    programs = batch * tiles * (heads if capture is None else 1)
    out = heads_last_empty(q)
    maps = q.new_empty((batch, groups, queries), dtype=torch.float32)
    # a pointer must be some tensor even where the flags say that it is not read
    weights = q if capture is None else capture.contiguous()
    group_blocks = blocks(max(groups, 1), block_g)
    tensors = q, k, v, weights, out, maps
    layout = *strides(q, align), *strides(k, align), *strides(v, align)
    kind = {"CAPTURE": capture is not None, "BLOCK_G": block_g}
    # the first block of groups also writes the output, the others only their maps
    for first, count, write_out in ((0, 1, True), (1, group_blocks - 1, False)):
        if count > 0:
            sizes = queries, tokens, heads, groups, first, tiles, scale * LOG2_E
            grid = (programs, count)
            launch(cross_fwd_kernel, grid, *tensors, *sizes, *layout, WRITE_OUT=write_out, **kind, **config)
    return out, maps


def backward(
    dout: Tensor | None,
    dmaps: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    capture: Tensor | None,
    scale: float,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    dout = None if dout is None else unit_rows(dout)
    if capture is None or dmaps is None:
        capture = dmaps = None
    else:
        capture, dmaps = capture.contiguous(), dmaps.contiguous()
    batch, heads, queries, _ = q.shape
    tokens = k.shape[2]
    align = common_align(q, k, v, dout)
    config = _config(q, k, Kernel.ROWS, align)
    groups = 0 if capture is None else capture.shape[1]
    layout = *strides(q, align), *strides(k, align), *strides(v, align), *strides(dout, align)
    given = {"HAS_DOUT": dout is not None, "HAS_DMAPS": dmaps is not None}
    inputs = q, k, v, *(q if t is None else t for t in (dout, capture, dmaps))
    dq = heads_last_empty(q) if needs.q else q.new_empty(0)
    tokens_too = needs.k or needs.v
    bound = shared_bound(config["BLOCK_N"], tokens, q.shape[3], q.element_size(), Kernel.ROWS, saves_rows=False)
    # rows that nobody reads are saved where the kernel would not fit otherwise: D = 160, T = 77 in float32 on sm_86
    saves_rows = tokens_too or bound > SHARED_LIMIT[current_arch(q.device)]
    rows = q.new_empty((2, batch, heads, queries), dtype=torch.float32) if saves_rows else None
    lse, delta = (None, None) if rows is None else (rows[0], rows[1])
    tiles = blocks(queries, config["BLOCK_N"])
    if needs.q or rows is not None:
        sizes = queries, tokens, heads, groups, tiles, float(scale), scale * LOG2_E
        kind = {"NEED_Q": needs.q, "SAVE_ROWS": rows is not None}
        grid = (batch * heads * tiles,)
        launch(cross_bwd_rows_kernel, grid, *inputs, dq, lse, delta, *sizes, *layout, **kind, **given, **config)
    if not tokens_too:
        return dq, q.new_empty(0), q.new_empty(0)
    config = _config(q, k, Kernel.TOKENS, align)
    columns = blocks(tokens, config["BLOCK_T"])
    splits, per_split = _splits(batch * heads * columns, queries, config["BLOCK_N"], current_arch(q.device))
    shape = (splits, batch, tokens, heads, q.shape[3])
    dtype = q.dtype if splits == 1 else torch.float32
    dk = q.new_empty(shape, dtype=dtype) if needs.k else None
    dv = q.new_empty(shape, dtype=dtype) if needs.v else None
    numbers = queries, tokens, heads, batch, groups, splits, per_split, float(scale), scale * LOG2_E
    kind = {"NEED_K": needs.k, "NEED_V": needs.v}
    tensors = *inputs, lse, delta, dk, dv
    launch(
        cross_bwd_tokens_kernel,
        (batch * heads * splits, columns),
        *tensors,
        *numbers,
        *layout,
        **kind,
        **given,
        **config,
    )
    return dq, _add_splits(dk, k), _add_splits(dv, v)


def _splits(programs: int, queries: int, block: int, arch: int) -> tuple[int, int]:
    """(splits, queries in each): about two programs a multiprocessor, so that one loads while the other multiplies."""
    wanted = max(1, min(blocks(2 * processors(arch), programs), blocks(queries, block)))
    per_split = block * blocks(blocks(queries, wanted), block)
    return blocks(queries, per_split), per_split


def _add_splits(part: Tensor | None, like: Tensor) -> Tensor:
    if part is None:
        return like.new_empty(0)
    if part.shape[0] == 1:
        return part[0].transpose(1, 2)
    return sum_partials(part, like.new_empty(part.shape[1:])).transpose(1, 2)


def aot_cases(arch: int) -> list[AotCase]:
    """Every attention resolution of the three models; k and v as a projection leaves them."""
    shapes = (
        ("SD1.5 64x64", 8, 4096, 40, 77),
        ("SD1.5 32x32", 8, 1024, 80, 77),
        ("SD1.5 16x16", 8, 256, 160, 77),
        ("SD1.5 8x8", 8, 64, 160, 77),
        ("SD2.1 96x96", 5, 9216, 64, 77),
        ("SDXL 64x64", 10, 4096, 64, 77),
        ("SDXL 32x32", 20, 1024, 64, 77),
        ("SDXL 32x32 long prompt", 20, 1024, 64, 154),
    )
    cases = []
    for label, heads, n, d, t in shapes:
        q, k = meta(1, n, heads, d).transpose(1, 2), meta(1, t, heads, d).transpose(1, 2)
        c, dm = meta(1, 2, t, dtype=torch.float32), meta(1, 2, n, dtype=torch.float32)
        calls = (
            ("", lambda q=q, k=k: forward(q, k, k, None, 0.1)),
            (" capture", lambda q=q, k=k, c=c: forward(q, k, k, c, 0.1)),
            ("", lambda q=q, k=k: backward(q, None, q, k, k, None, 0.1, Needs(True, True, True))),
            (" dq only", lambda q=q, k=k: backward(q, None, q, k, k, None, 0.1, Needs(True, False, False))),
            (" capture", lambda q=q, k=k, c=c, dm=dm: backward(q, dm, q, k, k, c, 0.1, Needs(True, True, True))),
        )
        for kind, call in calls:
            cases += record(arch, f"{label} bf16{kind}", call)
    q, k = (meta(1, n, 8, 40, dtype=torch.float16).transpose(1, 2) for n in (4096, 77))
    return cases + record(arch, "SD1.5 64x64 fp16", lambda: forward(q, k, k, meta(1, 2, 77, dtype=torch.float32), 0.1))
