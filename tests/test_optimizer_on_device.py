"""No optimizer step waits for its device, and what is decided there is what a host would have decided."""

import contextlib
import math

import pytest
import torch
from optimizer_cases import batches, network
from second_device import DEVICE, NAME, Second, one_thread  # noqa: F401 - a fixture of every test here

from pcs_kernels.ops.adamw8bit.row import COUNT, host_row
from pcs_kernels.optim import AdamW8bit, step_in_backward
from pcs_kernels.optim.step_numbers import PRIME, StepNumbers

READS = ("item", "__bool__", "__float__", "__int__", "__index__", "tolist", "cpu", "numpy")
WAITS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "_to_copy", "copy_")


class Read(AssertionError):
    """The host has read from the device."""


@contextlib.contextmanager
def nothing_read():
    """Inside, whatever makes a host wait for the second device raises."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (torch.Tensor, Second):
            for name in READS:
                if name in vars(kind) or kind is torch.Tensor:
                    patch.setattr(kind, name, _refusing(getattr(kind, name), name))
        plain = Second.__torch_dispatch__

        def dispatch(cls, func, types, args=(), kwargs=None):
            name = func._schema.name.removeprefix("aten::")
            to_host = torch.device((kwargs or {}).get("device") or NAME).type != NAME
            onto_host = name == "copy_" and not isinstance(args[0], Second)
            if name in WAITS and (name not in ("_to_copy", "copy_") or to_host or onto_host):
                raise Read(f"{name} reads from the device")
            return plain(func, types, args, kwargs)

        patch.setattr(Second, "__torch_dispatch__", classmethod(dispatch))
        yield


def _refusing(method, name):
    def read(self, *args, **options):
        if self.device.type == NAME:
            raise Read(f"{name} reads from the device")
        return method(self, *args, **options)

    return read


@pytest.mark.parametrize("read", [float, bool, torch.Tensor.cpu, lambda t: t.to("cpu"), lambda t: torch.equal(t, t)])
def test_the_detector_sees_a_read(read):
    x = torch.ones((), device=DEVICE)
    with nothing_read(), pytest.raises(Read):
        read(x)
    read(x)


def on_device(net, dtype=torch.float32):
    return net.to(DEVICE).to(dtype)


def moved(batch):
    return [t.to(DEVICE) for t in batch]


def few_apart(found, wanted, unit):
    """The device's corrections are float32's: a code, or a parameter of 16 bits, may fall the other way, 1 in 1000."""
    for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
        apart = (p.detach().cpu().float() - q.detach().float()).abs() > unit * q.detach().float().abs() + unit / 4
        assert float(apart.float().mean()) <= 1e-3


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_steps_are_taken_and_refused_without_a_read(dtype):
    """As on the CPU by the same numbers, given by the host there."""
    net, twin = on_device(network(), dtype), network().to(dtype)
    opt, expected = AdamW8bit(net.parameters()), AdamW8bit(twin.parameters())
    scales = [0.5, 0.25, math.nan, 0.5, math.inf, 2.0]
    flags = [True, True, True, False, True, True]
    given = torch.tensor(scales).to(DEVICE), torch.tensor(flags).to(DEVICE)
    for k, (scale, flag) in enumerate(zip(scales, flags, strict=True)):
        gradients = [torch.randn(p.shape).to(dtype) for p in twin.parameters()]
        for p, q, g in zip(net.parameters(), twin.parameters(), gradients, strict=True):
            p.grad, q.grad = g.to(DEVICE), g
        for group in (*opt.param_groups, *expected.param_groups):
            group["lr"] = 1e-3 * (k + 1)
        with nothing_read() if k else contextlib.nullcontext():
            opt.step(grad_scale=given[0][k], finite=given[1][k : k + 1])
        if flag and math.isfinite(scale):
            expected.step(grad_scale=scale)
    saved = opt.state_dict()["state"]
    assert [s["step"] for s in saved.values()] == [3] * 4
    few_apart(net, twin, torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6)


MODES = [
    (None, 1, "two_pass"),
    (0.05, 1, "two_pass"),
    (0.05, 1, "previous"),
    (0.05, 3, "two_pass"),
    (0.05, 2, "previous"),
]


@pytest.mark.parametrize("max_norm, accumulate, clip", MODES)
@pytest.mark.parametrize("scaled", (False, True), ids=("number", "tensor"))
def test_a_step_in_the_backward_reads_nothing(max_norm, accumulate, clip, scaled):
    net, twin = on_device(network()), network()
    handles = []
    for one in (net, twin):
        handles.append(step_in_backward(AdamW8bit(one.parameters(), lr=1e-3), accumulate, max_norm, clip))
    for k, batch in enumerate(zip(*[iter(list(batches(4 * accumulate)))] * accumulate, strict=True)):
        losses = []
        for handle, one, place in zip(handles, (net, twin), (DEVICE, "cpu"), strict=True):
            handle.loss_scale = torch.full((1,), 64.0 * (k + 1)).to(place) if scaled else 64.0 * (k + 1)
            here = [[t.to(place) for t in pair] for pair in batch]
            calls = [lambda x=x, y=y, one=one: (one(x) - y).square().mean() for x, y in here]
            with nothing_read() if k and place == DEVICE else contextlib.nullcontext():
                losses.append(handle.backward(*calls))
        torch.testing.assert_close(losses[0].cpu(), losses[1], rtol=1e-4, atol=1e-5)
    few_apart(net, twin, 1e-4)
    norms = [handle.state_dict()["norm"] for handle in handles]
    assert norms == [None, None] if max_norm is None else norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert int(handles[0].refused.cpu()) == 0


@pytest.mark.parametrize("max_norm, accumulate, clip", MODES)
def test_a_loss_that_is_not_finite_refuses_every_update(max_norm, accumulate, clip):
    """Told on the device, by the caller, while the step runs."""
    net = on_device(network())
    opt = AdamW8bit(net.parameters())
    handle = step_in_backward(opt, accumulate, max_norm, clip)
    (x, _), factor = moved(next(batches(1))), torch.ones((), device=DEVICE)
    before = []

    def loss_of():
        loss = net(x).sum() * factor
        handle.loss_finite = torch.isfinite(loss.detach())
        return loss

    for k in range(4):
        before = [p.detach().clone() for p in net.parameters()]
        factor.fill_(math.inf if k == 2 else 1.0)
        with nothing_read() if k else contextlib.nullcontext():
            handle.backward(*[loss_of] * accumulate)
        same = [torch.equal(p.detach(), q) for p, q in zip(net.parameters(), before, strict=True)]
        assert same == [k == 2] * 4
        assert int(handle.refused.cpu()) == (4 if k == 2 else 0)
    assert {s["step"] for s in opt.state_dict()["state"].values()} == {3}


@pytest.mark.parametrize("clip", ("two_pass", "previous"))
def test_a_gradient_that_is_not_finite_is_refused_on_the_device(clip):
    """By two passes everything, by the norm of the step before that parameter alone."""
    net = on_device(network())
    opt = AdamW8bit(net.parameters())
    handle = step_in_backward(opt, 1, 1.0, clip)
    x, _ = moved(next(batches(1)))
    handle.backward(lambda: net(x).sum())
    known = float(handle.norm.cpu())
    before = [p.detach().clone() for p in net.parameters()]
    broken = net[0].weight.register_hook(lambda g: g * math.inf)
    with nothing_read():
        handle.backward(lambda: net(x).sum())
    broken.remove()
    same = [torch.equal(p.detach(), q) for p, q in zip(net.parameters(), before, strict=True)]
    assert same == ([True] * 4 if clip == "two_pass" else [True, False, False, False])
    assert int(handle.refused.cpu()) == (4 if clip == "two_pass" else 1)
    assert float(handle.norm.cpu()) == known
    with nothing_read():
        handle.backward(lambda: net(x).sum())
    assert int(handle.refused.cpu()) == 0


def test_rows_made_on_the_device_are_the_hosts_bit_for_bit():
    """In float64; without it to the rounding of a few float32 operations."""
    groups = [
        dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2),
        dict(lr=5e-6, betas=(0.0, 0.95), eps=1e-6, weight_decay=0.0),
    ]
    for first in (True, False):
        exact = StepNumbers(torch.device("cpu"), [0, 1], [0, 1], 7, first)
        other = StepNumbers(DEVICE, [0, 1], [0, 1], 7, first)
        for numbers in (exact, other):
            numbers.fill(groups)
        for taken in (*range(40), 999, 1000, 99_999, 2**31 - 3):
            for numbers in (exact, other):
                numbers.counts.fill_(taken)
                numbers.compute(0.3, None)
            for i, g in enumerate(groups):
                settings = g["lr"], *g["betas"], g["eps"], g["weight_decay"], taken + 1, 0.3
                wanted = host_row(*settings, 7 * PRIME + i, first)
                assert torch.equal(exact.bits[i], wanted.view(torch.int32))
                torch.testing.assert_close(other.rows[i].cpu()[:10], wanted[:10], rtol=1e-6, atol=0)
                assert torch.equal(other.bits[i].cpu()[10:], wanted.view(torch.int32)[10:])


def test_counts_stay_where_a_group_is_added_and_where_a_state_is_loaded():
    p, q = (torch.nn.Parameter(torch.ones(5000).to(DEVICE)) for _ in range(2))
    opt = AdamW8bit([p])
    for _ in range(2):
        p.grad = torch.ones(5000).to(DEVICE)
        opt.step()
    opt.add_param_group({"params": [q], "lr": 1.0})
    q.grad = torch.ones(5000).to(DEVICE)
    opt.step()
    saved = opt.state_dict()
    assert [s["step"] for s in saved["state"].values()] == [3, 1]
    again = AdamW8bit([{"params": [p]}, {"params": [q], "lr": 1.0}])
    again.load_state_dict(saved)
    assert [s["step"] for s in again.state_dict()["state"].values()] == [3, 1]
    with nothing_read():
        again.step()
    assert [s["step"] for s in again.state_dict()["state"].values()] == [4, 2]


def test_updates_of_one_step_share_their_numbers_and_those_of_the_next_do_not():
    p, q = (torch.nn.Parameter(torch.ones(30)) for _ in range(2))
    opt = AdamW8bit([p, q], seed=None)
    group = opt.param_groups[0]
    for lr in (0.1, 0.2):
        group["lr"] = lr
        for one in (p, q):
            one.grad = torch.ones(30)
            opt.update(one, group)
    twins = [torch.nn.Parameter(torch.ones(30)) for _ in range(2)]
    other = AdamW8bit(twins, seed=None)
    for lr in (0.1, 0.2):
        other.param_groups[0]["lr"] = lr
        for one in twins:
            one.grad = torch.ones(30)
        other.step()
    assert torch.equal(p, twins[0]) and torch.equal(q, twins[1])
    assert [int(row.view(torch.int32)[COUNT]) for row in other._numbers[p.device].rows] == [2, 2]


def test_a_scale_that_no_step_can_use_is_named():
    p = torch.nn.Parameter(torch.ones(30))
    p.grad = torch.ones(30)
    opt = AdamW8bit([p])
    with pytest.raises(ValueError, match="grad_scale must be a finite number, not nan"):
        opt.step(grad_scale=math.nan)
    with pytest.raises(ValueError, match="grad_scale must be a number or a tensor of one element"):
        opt.step(grad_scale=torch.ones(2))
    with pytest.raises(ValueError, match="update needs a parameter of this optimizer"):
        opt.update(p, {"lr": 1.0})
