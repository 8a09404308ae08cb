"""self_attention: softmax(scale q k^T) v for image positions, by the fastest exact backend of this machine.

q [B,H,N,D]; k, v [B,H,M,D] -> out [B,H,N,D] with the memory of [B,N,H,D].

Backends: torch's scaled_dot_product_attention ("sdpa"), xformers, our Triton kernel, our native CPU kernel, the
reference. On an NVIDIA GPU sdpa runs where its flash kernel fits (16-bit, D a multiple of 8 up to 256), else xformers
where it is installed, else Triton where its kernel runs on this GPU, else sdpa's own fallbacks; on a CPU the native
kernel, else sdpa; on every other device sdpa. The reference, which stores all N x M scores, runs where it is forced,
and on a CPU for the dtypes that the native kernel refuses.
Kept for the backward: q, k, v, out and the log-sum-exp [B,H,N].
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from ... import _check as check
from ..._dispatch import ROCM, BackendUnavailable, Op, define, forced_backend, forced_external, without_autocast
from ..._dtypes import accumulator
from ..._fallback import Fault, tell_of_fault
from ..._layout import heads_last_empty, rows_far_apart

OP = Op("self_attention", __package__)


def _check_call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check.floating(name, x)
        check.rank(name, x, 4, "[B, H, N, D]")
        check.not_empty(name, x)
        check.same(name, x, "q", q)
    batch, heads, _, width = q.shape
    check.shape("k", k, (batch, heads, k.shape[2], width), "[B, H, M, D]")
    check.shape("v", v, (batch, heads, k.shape[2], width), "[B, H, M, D]")
    check.finite("scale", scale)


def _choose(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Any:
    _check_call(q, k, v, scale)
    return OP.select(backend, q.device.type, q, k, v, scale)


def _forward(chosen: Any, *args: Any) -> tuple[Tensor, Tensor]:
    return chosen.forward(*args[:-1])


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    _check_call(q, k, v, scale)
    return heads_last_empty(q), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


def _choose_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, backend: str
) -> Any:
    return OP.select(backend, q.device.type, q, k, v, scale)


def _backward(chosen: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return chosen.backward(*args[:-1])


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return heads_last_empty(q), heads_last_empty(k), heads_last_empty(v)


def _flops(q: Tensor, k: Tensor) -> int:
    """Two products of [N, D] and [M, D] a head."""
    return 4 * q.numel() * k.shape[2]


def _backward_flops(q: Tensor, k: Tensor) -> int:
    """Five such products: P again, dP, dv, dq and dk."""
    return 10 * q.numel() * k.shape[2]


_FORWARD = define(
    "self_attention_forward(Tensor q, Tensor k, Tensor v, float scale, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _flops,
    choose=_choose,
)
_BACKWARD = define(
    "self_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _backward_flops,
    choose=_choose_backward,
)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
        out, lse = _FORWARD(q, k, v, scale, backend)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = scale, backend
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        scale, backend = ctx.settings
        gradients = _BACKWARD(dout, q, k, v, out, lse, scale, backend)
        return (*(g if n else None for g, n in zip(gradients, ctx.needs_input_grad[:3], strict=True)), None, None)


def flash_reason(dtype: torch.dtype, width: int) -> str | None:
    """Why torch's flash kernel would not run on a GPU, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"its flash kernel takes float16 and bfloat16, not {dtype}"
    if width % 8 or width > 256:
        return f"its flash kernel takes head widths that are multiples of 8 up to 256, not {width}"
    return None


def xformers_reason(device_type: str) -> str | None:
    """Why xformers would not run, or None."""
    if device_type != "cuda":
        return "xformers needs a CUDA tensor"
    if importlib.util.find_spec("xformers") is None:
        return "the xformers package is not installed. Fix: pip install xformers"
    return None


def backend_of(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """ "sdpa", "xformers" or "op" (one of this package's own backends)."""
    if forced_backend():
        return "op"
    if forced_external():
        return forced_external()
    if device.type == "cpu":
        return "op" if dtype is torch.float64 or not isinstance(OP.module("native"), str) else "sdpa"
    if device.type == "cuda" and flash_reason(dtype, width) is not None:
        if xformers_reason(device.type) is None and dtype is not torch.float64:
            return "xformers"
        reason = triton_reason(device, dtype, width)
        if isinstance(reason, Fault):
            tell_of_fault("triton", reason)
        return "op" if reason is None else "sdpa"
    return "sdpa"


# torch.compiler.assume_constant_result does no more, but importing it would load the whole compiler.
backend_of.__dict__["_dynamo_marked_constant"] = True


def triton_reason(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why our Triton kernel would not run on a GPU, or None."""
    if ROCM:
        return ROCM
    module = OP.module("triton")
    if isinstance(module, str):
        return module
    if not torch.cuda.is_available():  # fake tensors: what is planned for is another machine's GPU
        return None if dtype is not torch.float64 else "the triton kernels take no float64"
    found: str | None = module.reason_for(device, dtype, width)
    return found


def self_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention of all queries to all keys: softmax(scale q k^T) v, differentiable.

    Args:
        q: [B, H, N, D].
        k: [B, H, M, D].
        v: [B, H, M, D].
        scale: of the scores; default: D ** -0.5.

    Returns:
        [B, H, N, D] with the memory of [B, N, H, D], so that merging the heads is a free view.
    """
    check.tensor("q", q)
    scale = check.attention_scale(scale, q)
    external = backend_of(q.device, q.dtype, q.shape[-1] if q.dim() else 0)
    if external == "op" and q.device.type == "cuda" and not forced_backend() and any(map(rows_far_apart, (q, k, v))):
        external = "sdpa"  # where our kernel refuses, the reference would store all scores
    if external != "op":
        for name, x in (("q", q), ("k", k), ("v", v)):
            check.tensor(name, x)
        _check_call(q, k, v, scale)
        return _sdpa(q, k, v, scale) if external == "sdpa" else _xformers(q, k, v, scale)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (q, k, v)):
        return _SelfAttention.apply(q, k, v, scale, forced_backend())
    return _FORWARD(q, k, v, scale, forced_backend())[0]


@without_autocast
def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


@without_autocast
def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    reason = xformers_reason(q.device.type)
    if reason is not None:
        raise BackendUnavailable(f"self_attention: {reason}")
    from xformers.ops import memory_efficient_attention

    out = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)
