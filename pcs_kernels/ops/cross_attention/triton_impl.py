"""Cross-attention with captured maps in Triton.

B batch, H heads, N queries, T tokens (<= 320), D head width, G captured groups. The forward is one kernel; with a
capture its programs loop over the heads and write each map once. The backward recomputes P: one kernel over query
tiles (dq, and each row's lse and delta), one over blocks of tokens and splits of the queries (dk, dv), then the
splits are added in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._launch import (
    MULTIPROCESSORS,
    AotCase,
    blocks,
    current_arch,
    launch,
    meta,
    pow2,
    record,
    split_width,
    unavailable,
)
from ..._layout import heads_last_empty, unit_rows
from ..._math import LOG2_E, common_align, head_reason, strides, sum_partials
from .op import MAX_TOKENS, Needs
from .triton_kernels import cross_bwd_rows_kernel, cross_bwd_tokens_kernel, cross_fwd_kernel

MAX_BLOCK_G = 4


def launch_config(
    batch: int, heads: int, queries: int, tokens: int, width: int, arch: int, kernel: str, half: bool = True
) -> dict[str, int]:
    """Tiles of `kernel`: "forward", "capture", "rows" or "tokens"; smaller where few queries would leave a GPU idle."""
    d0, d1 = split_width(width)
    config = {"D": width, "D0": d0, "D1": d1, "num_warps": 4, "num_stages": 1}
    if kernel == "tokens":
        block_n = 16 if not half or 64 < width <= 96 else 32
        block_t = 16 if tokens <= 16 or width <= 48 or width > 96 else 32
        warps = 8 if 64 < width <= 96 else 4
        return config | {"BLOCK_N": block_n, "BLOCK_T": block_t, "num_warps": warps, "num_stages": 2}
    t0, t1 = split_width(tokens)
    block = 16 if not half or tokens > 160 or width > 96 else 32 if tokens > 80 else 64
    least = 16
    if kernel == "rows" and width > 96:
        config["num_warps"] = 8
    if kernel == "capture":
        # the next head's k and v are fetched ahead where they fit every card's shared memory
        config |= {"num_stages": 2 if (t0 + t1) * (d0 + d1) <= 16384 else 1, "num_warps": 8 if width > 64 else 4}
        least = min(block, 32 if width > 64 else 16)
    programs = batch * (1 if kernel == "capture" else heads)
    while block > least and programs * blocks(queries, block) < MULTIPROCESSORS[arch]:
        block //= 2
    return config | {"T0": t0, "T1": t1, "BLOCK_N": block}


def reason(q: Tensor, k: Tensor, v: Tensor, capture: Tensor | None = None, *_: object) -> str | None:
    why = unavailable(q, dots=True)
    if why is None and k.shape[2] > MAX_TOKENS:
        why = f"{k.shape[2]} tokens are above {MAX_TOKENS}; use self_attention, which takes any number of keys"
    return why or head_reason(q, k, v)


def _config(q: Tensor, k: Tensor, kernel: str, align: int) -> dict[str, int]:
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
    config = _config(q, k, "forward" if capture is None else "capture", align)
    block_g = min(pow2(max(groups, 1)), MAX_BLOCK_G)
    tiles = blocks(queries, config["BLOCK_N"])
    programs = batch * tiles * (heads if capture is None else 1)
    out = heads_last_empty(q)
    maps = q.new_empty((batch, groups, queries), dtype=torch.float32)
    # a pointer must be some tensor even where the flags say that it is not read
    weights = q if capture is None else capture.contiguous()
    group_blocks = blocks(max(groups, 1), block_g)
    for first, count, write_out in ((0, 1, True), (1, group_blocks - 1, False)):
        if count > 0:
            launch(
                cross_fwd_kernel, (programs, count), q, k, v, weights, out, maps,
                queries, tokens, heads, groups, first, tiles, scale * LOG2_E,
                *strides(q, align), *strides(k, align), *strides(v, align),
                CAPTURE=capture is not None, BLOCK_G=block_g, WRITE_OUT=write_out, **config,
            )  # fmt: skip
    return out, maps


def backward(
    dout: Tensor | None, dmaps: Tensor | None, q: Tensor, k: Tensor, v: Tensor, capture: Tensor | None, scale: float,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    dout = None if dout is None else unit_rows(dout)
    if capture is None or dmaps is None:
        capture = dmaps = None
    else:
        capture, dmaps = capture.contiguous(), dmaps.contiguous()
    batch, heads, queries, _ = q.shape
    tokens = k.shape[2]
    align = common_align(q, k, v, dout)
    config = _config(q, k, "rows", align)
    groups = 0 if capture is None else capture.shape[1]
    layout = *strides(q, align), *strides(k, align), *strides(v, align), *strides(dout, align)
    given = {"HAS_DOUT": dout is not None, "HAS_DMAPS": dmaps is not None}
    inputs = q, k, v, *(q if t is None else t for t in (dout, capture, dmaps))
    dq = heads_last_empty(q) if needs.q else q.new_empty(0)
    rows = q.new_empty((2, batch, heads, queries), dtype=torch.float32) if needs.k or needs.v else None
    lse, delta = (None, None) if rows is None else (rows[0], rows[1])
    tiles = blocks(queries, config["BLOCK_N"])
    if needs.q or rows is not None:
        launch(
            cross_bwd_rows_kernel, (batch * heads * tiles,), *inputs, dq, lse, delta,
            queries, tokens, heads, groups, tiles, float(scale), scale * LOG2_E, *layout,
            NEED_Q=needs.q, SAVE_ROWS=rows is not None, **given, **config,
        )  # fmt: skip
    if rows is None:
        return dq, q.new_empty(0), q.new_empty(0)
    config = _config(q, k, "tokens", align)
    columns = blocks(tokens, config["BLOCK_T"])
    splits, per_split = _splits(batch * heads * columns, queries, config["BLOCK_N"], current_arch(q.device))
    shape = (splits, batch, tokens, heads, q.shape[3])
    dtype = q.dtype if splits == 1 else torch.float32
    dk = q.new_empty(shape, dtype=dtype) if needs.k else None
    dv = q.new_empty(shape, dtype=dtype) if needs.v else None
    launch(
        cross_bwd_tokens_kernel, (batch * heads * splits, columns), *inputs, lse, delta, dk, dv,
        queries, tokens, heads, batch, groups, splits, per_split, float(scale), scale * LOG2_E, *layout,
        NEED_K=needs.k, NEED_V=needs.v, **given, **config,
    )  # fmt: skip
    return dq, _add_splits(dk, k), _add_splits(dv, v)


def _splits(programs: int, queries: int, block: int, arch: int) -> tuple[int, int]:
    """(splits, queries in each): about two programs a multiprocessor."""
    wanted = max(1, min(blocks(2 * MULTIPROCESSORS[arch], programs), blocks(queries, block)))
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
