"""cross_attention: attention of image queries over text tokens that also returns the chosen tokens' maps.

B batch, H heads, N queries, T tokens (at most 320), D head width, G groups of tokens.
q [B,H,N,D]; k, v [B,H,T,D]; capture [B,G,T] float32 token weights -> out [B,H,N,D], maps [B,G,N] float32.

    P = softmax(scale q k^T);  out = P v;  maps[b,g,n] = mean_h sum_t P[b,h,n,t] capture[b,g,t]

Kept for the backward: q, k, v (and capture); the N x T matrix P is never stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _check as check
from ..._dispatch import Op, define, forced_backend
from ..._dtypes import accumulator
from ..._layout import heads_last_empty

OP = Op("cross_attention", __package__)
MAX_TOKENS = 320  # four chunks of 77 fit; a Triton program holds all scores of its queries, [tile, T], in registers


class Needs(NamedTuple):
    """Which gradients a backward must compute."""

    q: bool
    k: bool
    v: bool


def _check_call(q: Tensor, k: Tensor, v: Tensor, capture: Tensor | None, scale: float) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check.floating(name, x)
        check.rank(name, x, 4, "[B, H, N, D]")
        check.not_empty(name, x)
        check.same(name, x, "q", q)
    batch, heads, _, width = q.shape
    tokens = k.shape[2]
    check.shape("k", k, (batch, heads, tokens, width), "[B, H, T, D]")
    check.shape("v", v, (batch, heads, tokens, width), "[B, H, T, D]")
    check.require(tokens <= MAX_TOKENS, lambda: f"k has {tokens} tokens; cross_attention takes at most {MAX_TOKENS}")
    check.finite("scale", scale)
    if capture is not None:
        check.floating("capture", capture)
        check.rank("capture", capture, 3, "[B, G, T]")
        check.shape("capture", capture, (batch, capture.shape[1], tokens), "[B, G, T]")
        check.not_empty("capture", capture)
        check.dtype_in("capture", capture, (torch.float32, accumulator(q.dtype)))
        check.same_device("capture", capture, "q", q)


def _choose(q: Tensor, k: Tensor, v: Tensor, capture: Tensor | None, scale: float, backend: str) -> Any:
    _check_call(q, k, v, capture, scale)
    return OP.select(backend, q.device.type, q, k, v, capture, scale)


def _forward(chosen: Any, *args: Any) -> tuple[Tensor, Tensor]:
    return chosen.forward(*args[:-1])


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, capture: Tensor | None, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    _check_call(q, k, v, capture, scale)
    groups = 0 if capture is None else capture.shape[1]
    return heads_last_empty(q), q.new_empty((q.shape[0], groups, q.shape[2]), dtype=accumulator(q.dtype))


def _choose_backward(
    dout: Tensor | None,
    dmaps: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    capture: Tensor | None,
    scale: float,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    backend: str,
) -> Any:
    return OP.select(backend, q.device.type, q, k, v, capture, scale)


def _backward(chosen: Any, *args: Any) -> tuple[Tensor, ...]:
    return chosen.backward(*args[:7], Needs(*args[7:10]))


def _backward_fake(
    dout: Tensor | None,
    dmaps: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    capture: Tensor | None,
    scale: float,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    needed = ((q, need_q), (k, need_k), (v, need_v))
    return tuple(heads_last_empty(x) if need else q.new_empty(0) for x, need in needed)


def _flops(q: Tensor, k: Tensor) -> int:
    """Two products of [N, D] and [T, D] a head."""
    return 4 * q.numel() * k.shape[2]


def _backward_flops(q: Tensor, k: Tensor) -> int:
    """Five such products: P again, dP, dv, dq and dk."""
    return 10 * q.numel() * k.shape[2]


_FORWARD = define(
    "cross_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? capture, float scale, str backend)"
    " -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _flops,
    choose=_choose,
)
_BACKWARD = define(
    "cross_attention_backward(Tensor? dout, Tensor? dmaps, Tensor q, Tensor k, Tensor v, Tensor? capture, float scale,"
    " bool need_q, bool need_k, bool need_v, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _backward_flops,
    choose=_choose_backward,
)


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, capture: Tensor | None, scale: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        out, maps = _FORWARD(q, k, v, capture, scale, backend)
        ctx.save_for_backward(q, k, v, capture)
        ctx.settings = scale, backend
        ctx.set_materialize_grads(False)
        return out, maps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dmaps: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, capture = ctx.saved_tensors
        scale, backend = ctx.settings
        need = ctx.needs_input_grad[:3]
        gradients = _BACKWARD(dout, None if capture is None else dmaps, q, k, v, capture, scale, *need, backend)
        return (*(g if n else None for g, n in zip(gradients, need, strict=True)), None, None, None)


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, capture: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention over text tokens that also returns the maps of chosen tokens; gradients flow through both.

    Args:
        q: [B, H, N, D].
        k: [B, H, T, D] with at most 320 tokens.
        v: [B, H, T, D].
        capture: token weights [B, G, T], one row a map (1.0 at each token of interest); it takes no gradient itself.
        scale: of the scores; default: D ** -0.5.

    Returns:
        out [B, H, N, D], and maps [B, G, N], the mean over the heads; None without `capture`.
    """
    check.tensor("q", q)
    scale = check.attention_scale(scale, q)
    if isinstance(capture, Tensor) and capture.requires_grad and torch.is_grad_enabled():
        raise ValueError("capture takes no gradient and asks for one. Fix: capture.detach()")
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (q, k, v)):
        out, maps = _CrossAttention.apply(q, k, v, capture, scale, forced_backend())
    else:
        out, maps = _FORWARD(q, k, v, capture, scale, forced_backend())
    return out, (None if capture is None else maps)
