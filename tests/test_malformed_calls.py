"""Malformed calls at every op on every backend: a Python exception that names an argument, or a right answer."""

import random
import re

import pytest
import torch

import pcs_kernels
from pcs_kernels.ops.adamw8bit.codes import code_map
from tests.every_case import EVERY_CASE

CALLS = 2000 if EVERY_CASE else 700  # the first of the same ones
ARGUMENTS = {
    "geglu": ("x",),
    "group_norm_silu": ("x", "groups", "weight", "bias", "eps", "activation"),
    "cross_attention": ("q", "k", "v", "capture", "scale"),
    "self_attention": ("q", "k", "v", "scale"),
    "lowrank_residual": ("x", "weight", "bias", "down", "up", "mask", "scale", "index"),
    "frozen_conv2d": ("x", "weight", "bias", "stride", "padding"),
    "frozen_linear": ("x", "weight", "bias"),
    "adamw8bit": (
        "param", "grad", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "lr", "beta1", "beta2", "eps",
        "weight_decay", "step", "block_size", "grad_scale", "seed", "decay_first",
    ),
}  # fmt: skip


def good_arguments(name: str) -> dict[str, object]:
    R = torch.randn
    if name == "geglu":
        return dict(x=R(3, 64))
    if name == "group_norm_silu":
        return dict(x=R(2, 8, 4, 4), groups=4, weight=R(8), bias=R(8), eps=1e-5, activation="silu")
    if name == "cross_attention":
        return dict(q=R(2, 2, 9, 8), k=R(2, 2, 5, 8), v=R(2, 2, 5, 8), capture=torch.rand(2, 1, 5), scale=0.3)
    if name == "self_attention":
        return dict(q=R(2, 2, 9, 8), k=R(2, 2, 9, 8), v=R(2, 2, 9, 8), scale=0.3)
    if name == "lowrank_residual":
        adapters = dict(down=R(3, 2, 8), up=R(3, 6, 2), mask=torch.rand(2, 5), scale=0.5, index=torch.tensor([2, 0]))
        return dict(x=R(2, 5, 8), weight=R(6, 8), bias=R(6), **adapters)
    if name == "frozen_conv2d":
        return dict(x=R(1, 4, 6, 6), weight=R(8, 4, 3, 3), bias=R(8), stride=1, padding=1)
    if name == "frozen_linear":
        return dict(x=R(3, 8), weight=R(4, 8), bias=R(4))
    states = [torch.full((300,), 127, dtype=torch.uint8) for _ in range(2)]
    values = (R(300), R(300), *states, torch.ones(2), torch.ones(2), code_map(True), code_map(False))
    numbers = (1e-3, 0.9, 0.999, 1e-8, 1e-2, 1, 256, 1.0, 7, True)
    return dict(zip(ARGUMENTS[name], (*values, *numbers), strict=True))


def spoil_tensor(x: torch.Tensor, rng: random.Random) -> object:
    """One way of many to get a tensor wrong, or unusual: what is right after all must be answered rightly."""
    ways = [
        lambda: x.unsqueeze(0),
        lambda: x.flatten(),
        lambda: x[0],
        lambda: x.unsqueeze(-1),
        lambda: x.to(torch.int32),
        lambda: x.to(torch.float16),
        lambda: x.to(torch.bfloat16),
        lambda: x.to(torch.float64),
        lambda: x.to(torch.complex64),
        lambda: x.bool(),
        lambda: x.to("meta"),
        lambda: x[:0],
        lambda: x[..., :0],
        lambda: x[..., :-1],
        lambda: torch.cat([x, x], 0),
        lambda: torch.cat([x, x], -1),
        lambda: x.transpose(0, -1),
        lambda: x.flip(-1),
        lambda: x[..., ::2],
        lambda: x[:1].expand(x.shape),
        lambda: torch.as_strided(x, x.shape, (0,) * x.dim()),
        lambda: torch.full_like(x, float("nan")) if x.is_floating_point() else x + 100,
        lambda: x * float("inf") if x.is_floating_point() else x - 100,
        lambda: x.to_sparse() if x.is_floating_point() else -x - 1,
        lambda: torch.empty(()),
        lambda: torch.empty(0),
        lambda: None,
        lambda: "tensor",
        lambda: 3.5,
        lambda: [1.0, 2.0],
        lambda: x.tolist(),
        lambda: x.numpy() if x.dim() else x.item(),
        lambda: object(),
    ]
    return rng.choice(ways)()


def spoil(value: object, rng: random.Random) -> object:
    if isinstance(value, torch.Tensor):
        return spoil_tensor(value, rng)
    return rng.choice(
        [None, "no", -1, 0, 10**9, 2**70, -0.5, float("nan"), float("inf"), [1], object(), torch.ones(2), 1.5]
    )


def names_an_argument(name: str, message: str) -> bool:
    """One of the arguments as a word of its own, or the op that has no such backend."""
    words = (*ARGUMENTS[name], name, name.replace("conv2d", "conv").replace("linear", "conv"))
    return any(re.search(rf"\b{word}\b", message) for word in words)


def extreme(arguments: dict[str, object]) -> bool:
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.device.type == "cpu":
            if not value.isfinite().all():
                return True
        elif isinstance(value, (int, float)) and not abs(value) < 1e4:
            return True
    return False


def describe(arguments: dict[str, object]) -> str:
    def one(v: object) -> str:
        return f"{v.dtype}{tuple(v.shape)} on {v.device}" if isinstance(v, torch.Tensor) else repr(v)[:60]

    return ", ".join(f"{k}={one(v)}" for k, v in arguments.items())


def run(name: str, arguments: dict[str, object]):
    if name == "adamw8bit":
        return pcs_kernels.ops.adamw8bit.step_8bit(*arguments.values())
    return getattr(pcs_kernels, name)(**arguments)


def copied(arguments: dict[str, object]) -> dict[str, object]:
    return {
        k: v.clone() if isinstance(v, torch.Tensor) and k not in ("qmap1", "qmap2") else v for k, v in arguments.items()
    }


def answer(name: str, arguments: dict[str, object]) -> list[torch.Tensor]:
    result = run(name, arguments)
    if name == "adamw8bit":
        result = tuple(v for v in arguments.values() if isinstance(v, torch.Tensor))
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.device.type == "meta" or expected.device.type == "meta":
        return found.shape == expected.shape
    # spoilt arguments (repeated, huge, of stride 0) cost digits on any backend; a wrong answer differs by its own size
    loose = 0.1 if found.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if found.dtype == torch.uint8:
        return bool(((found.int() - expected.int()).abs() <= 1).all())
    return torch.allclose(found.double(), expected.double(), rtol=loose, atol=loose, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("reference", "native", "triton"))
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_malformed_call_is_answered_or_refused(name, backend, monkeypatch):
    torch.utils.deterministic.fill_uninitialized_memory = False
    monkeypatch.setattr("pcs_kernels._dispatch._forced", backend)
    rng = random.Random(f"{name} {backend}")
    refused = 0
    for number in range(CALLS):
        torch.manual_seed(number)
        arguments = good_arguments(name)
        for spoilt in rng.sample(list(arguments), min(len(arguments), rng.choice((1, 1, 1, 2)))):
            arguments[spoilt] = spoil(arguments[spoilt], rng)
        reference = copied(arguments)
        try:
            found = answer(name, arguments)
        except Exception as error:
            refused += 1
            message = str(error)
            assert names_an_argument(name, message), (
                f"{name}({describe(reference)}) says {type(error).__name__}: {message}"
            )
            continue
        monkeypatch.setattr("pcs_kernels._dispatch._forced", "reference")
        expected = answer(name, reference)
        monkeypatch.setattr("pcs_kernels._dispatch._forced", backend)
        if extreme(reference):
            continue  # infinities and overflow may come out in another way; that they come out without harm is enough
        for a, b in zip(found, expected, strict=True):
            assert same(a, b), f"{name}({describe(reference)}) differs from the reference"
    assert refused > CALLS // 10


def test_good_calls_are_answered():
    for name in ARGUMENTS:
        assert answer(name, good_arguments(name))
