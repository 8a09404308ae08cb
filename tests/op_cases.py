"""Every op at a few hostile shapes: calls of tensors, shared by the tests of values, gradients and builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import pcs_kernels


@dataclass
class Case:
    name: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: list[Tensor]  # float64 values that every dtype is rounded from; all take gradients


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * scale


def constant(x: Tensor) -> Callable[[Tensor], Tensor]:
    """A frozen operand, in the dtype and on the device of the input it goes with."""
    return lambda like: x.to(like.dtype).to(like.device)


def like(capture: Tensor, q: Tensor) -> Tensor:
    """Token weights as cross_attention takes them with q: float32, or float64 with float64."""
    return capture.to(q.device, torch.promote_types(q.dtype, capture.dtype))


def geglu() -> list[Case]:
    shapes = ((7, 2 * 341), (2, 63, 2 * 80), (1, 2), (3, 5, 2, 34))
    cases = [Case(f"geglu {s}", pcs_kernels.geglu, [normal(*s)]) for s in shapes]
    return [*cases, Case("geglu non-contiguous", lambda x: pcs_kernels.geglu(x.transpose(0, 1)), [normal(9, 5, 64)])]


def group_norm_silu() -> list[Case]:
    cases = []
    layouts = {
        "contiguous": lambda x: x,
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "strided": lambda x: x[:, :, ::2],
    }
    for channels, groups, size in ((64, 32, (13, 9)), (341, 11, (6, 7)), (320, 32, (2, 1)), (8, 8, (33, 1))):
        for layout, of in layouts.items():
            for activation in ("silu", None):

                def call(x, w, b, groups=groups, of=of, activation=activation):
                    return pcs_kernels.group_norm_silu(of(x), groups, w, b, activation=activation)

                inputs = [normal(2, channels, *size) * 3 + 5, normal(channels), normal(channels)]
                cases.append(Case(f"group_norm {channels}/{groups} {layout} {activation}", call, inputs))
    without_affine = Case(
        "group_norm without affine, 3-d", lambda x: pcs_kernels.group_norm_silu(x, 4), [normal(2, 12, 31)]
    )
    return [*cases, without_affine]


def attention_inputs(batch: int, heads: int, queries: int, keys: int, width: int) -> list[Tensor]:
    return [normal(batch, heads, n, width) for n in (queries, keys, keys)]


def split_heads(x: Tensor) -> Tensor:
    """[B, H, N, D] laid out as a projection leaves it: [B, N, H D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def self_attention() -> list[Case]:
    sizes = ((2, 2, 63, 63, 40), (1, 3, 130, 517, 160), (1, 2, 300, 77, 80), (2, 1, 5, 1, 33), (1, 1, 257, 300, 64))
    cases = [Case(f"self_attention {s}", pcs_kernels.self_attention, attention_inputs(*s)) for s in sizes]

    def viewed(*x):
        return pcs_kernels.self_attention(*map(split_heads, x), scale=0.3)

    def level(*x):
        return pcs_kernels.self_attention(*x, scale=0.0)

    cases.append(Case("self_attention of scale 0", level, attention_inputs(1, 2, 40, 70, 40)))
    return [*cases, Case("self_attention of views", viewed, attention_inputs(1, 4, 100, 100, 40))]


def cross_attention() -> list[Case]:
    cases = []
    for size, maps in (
        ((2, 2, 63, 77, 40), 3),
        ((1, 8, 341, 77, 64), 1),
        ((1, 2, 200, 154, 80), 2),
        ((2, 1, 65, 320, 160), 6),
        ((1, 3, 70, 2, 33), 4),
    ):
        batch, _, _, tokens, _ = size
        capture = torch.rand(batch, maps, tokens)

        def with_maps(q, k, v, capture=capture):
            return pcs_kernels.cross_attention(split_heads(q), k, v, like(capture, q))

        def without(*x):
            return pcs_kernels.cross_attention(*x)[0]

        def only_maps(*x, f=with_maps):
            return f(*x)[1]

        for name, call in (("with maps", with_maps), ("without", without), ("maps alone", only_maps)):
            cases.append(Case(f"cross_attention {size} {name}", call, attention_inputs(*size)))
    return cases


def lowrank_residual() -> list[Case]:
    cases = []

    def masked(*t):
        return pcs_kernels.lowrank_residual(*t, scale=0.7)

    def conv(x, w, d, u):
        return pcs_kernels.lowrank_residual(x, w[:, :, None, None], None, d, u)

    def stacked(*t):
        return pcs_kernels.lowrank_residual(*t, index=torch.tensor([2, 0], device=t[0].device))

    for rows, c_in, c_out, rank in ((63, 320, 320, 16), (7, 341, 63, 5), (100, 64, 640, 32), (1, 2, 3, 1)):
        x, weight, bias = normal(2, rows, c_in), normal(c_out, c_in, scale=c_in**-0.5), normal(c_out)
        down, up = normal(rank, c_in, scale=c_in**-0.5), normal(c_out, rank)
        mask = torch.rand(2, rows, dtype=torch.float64)
        stack = [torch.stack([p, p * 2, p * 3]) for p in (down, up)]
        size = f"{rows}x{c_in}->{c_out} r{rank}"
        cases.append(Case(f"lowrank {size} masked", masked, [x, weight, bias, down, up, mask]))
        cases.append(Case(f"lowrank {size} conv", conv, [x, weight, down, up]))
        cases.append(Case(f"lowrank {size} stacked", stacked, [x, weight, bias, *stack, mask]))
    return cases


def frozen_conv() -> list[Case]:
    cases = []

    def last(x):
        return x.contiguous(memory_format=torch.channels_last)

    for kernel, stride, padding in ((3, 1, 1), (3, 2, 1), (1, 1, 0), (3, 1, 0), (5, 3, 2)):
        weight = constant(normal(24, 20, kernel, kernel, scale=(20 * kernel**2) ** -0.5))
        bias = constant(normal(24))
        for layout, of in (("contiguous", lambda x: x), ("channels last", last)):

            def call(x, weight=weight, bias=bias, of=of, stride=stride, padding=padding):
                return pcs_kernels.frozen_conv2d(of(x), weight(x), bias(x), stride, padding)

            cases.append(Case(f"conv k{kernel} s{stride} p{padding} {layout}", call, [normal(2, 20, 14, 11)]))
    weight, bias = constant(normal(63, 341, scale=341**-0.5)), constant(normal(63))

    def linear(x, **options):
        return pcs_kernels.frozen_linear(x, weight(x), bias(x), **options)

    cases.append(Case("linear", linear, [normal(2, 7, 341)]))
    cases.append(Case("linear unpacked", lambda x: linear(x, pack=False), [normal(5, 341)]))
    return cases


def on(weight: pcs_kernels.Int8Weight) -> Callable[[Tensor], pcs_kernels.Int8Weight]:
    """A weight in 8 bits on the device of the input it goes with; it has no dtype of its own."""
    return lambda x: pcs_kernels.Int8Weight(*(t.to(x.device) for t in weight))


def int8_weight() -> list[Case]:
    """Products with weights in 8 bits: whole blocks of 64 inputs, less than one, and rows that end within one."""
    cases = []
    for ins, outs, kernel, stride in ((64, 24, 3, 1), (20, 40, 3, 2), (16, 8, 1, 1)):
        weight = on(pcs_kernels.quantize_weight(normal(outs, ins, kernel, kernel, scale=(ins * kernel**2) ** -0.5)))
        bias = constant(normal(outs))

        def conv(x, weight=weight, bias=bias, stride=stride, padding=kernel // 2):
            x = x.contiguous(memory_format=torch.channels_last)
            return pcs_kernels.frozen_conv2d(x, weight(x), bias(x), stride, padding)

        cases.append(Case(f"int8 conv {ins}->{outs} k{kernel} s{stride}", conv, [normal(2, ins, 9, 7)]))
    for ins, outs in ((128, 63), (341, 64), (3, 5)):
        weight = on(pcs_kernels.quantize_weight(normal(outs, ins, scale=ins**-0.5)))
        adapter = [normal(4, ins, scale=ins**-0.5), normal(outs, 4)]

        def linear(x, weight=weight):
            return pcs_kernels.frozen_linear(x, weight(x))

        def lowrank(x, down, up, weight=weight):
            return pcs_kernels.lowrank_residual(x, weight(x), None, down, up)

        cases.append(Case(f"int8 linear {ins}->{outs}", linear, [normal(2, 7, ins)]))
        cases.append(Case(f"int8 lowrank {ins}->{outs}", lowrank, [normal(2, 7, ins), *adapter]))
    return cases


def all_cases() -> list[Case]:
    torch.manual_seed(0)
    makers = (geglu, group_norm_silu, self_attention, cross_attention, lowrank_residual, frozen_conv, int8_weight)
    return [case for maker in makers for case in maker()]


def evaluate(
    case: Case, backend: str, dtype: torch.dtype, compute: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, Tensor]:
    """Outputs and every input's gradient on one backend; values are rounded to `dtype`, arithmetic is in `compute`."""
    generator = torch.Generator().manual_seed(1)
    compute = compute or dtype
    leaves = [x.to(dtype).to(device, compute).requires_grad_() for x in case.inputs]
    with pcs_kernels.backend(backend):
        outputs = case.call(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        seeds = [torch.randn(y.shape, generator=generator).to(dtype).to(y) for y in outputs]
        torch.autograd.backward(outputs, seeds)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"gradient of input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
