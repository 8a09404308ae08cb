"""The optimizer step inside the backward: the ordinary step's values, one gradient alive at a time."""

import pytest
import torch
from optimizer_cases import batches, network

from pcs_kernels.optim import AdamW8bit, step_in_backward


def untouched(opt) -> bool:
    """Whether every state is what it was made as, and no step is counted."""
    saved = opt.state_dict()["state"].values()
    return all(s["step"] == 0 and not s.get("absmax1", s["state1"]).any() for s in saved)


@pytest.mark.parametrize("clip", ("two_pass", "previous"))
@pytest.mark.parametrize("max_norm", (None, 0.05))
@pytest.mark.parametrize("scale", (1.0, 2.0**10))
def test_step_in_backward_equals_the_ordinary_step(clip, max_norm, scale):
    """Whatever the loss scale is, and when it changes from step to step."""
    ours, theirs = network(), network()
    a, b = AdamW8bit(ours.parameters(), lr=1e-3), AdamW8bit(theirs.parameters(), lr=1e-3)
    handle = step_in_backward(a, max_norm=max_norm, clip=clip)
    previous = None
    for x, y in batches(6):
        handle.loss_scale, scale = scale, 2 * scale if scale > 1 else scale
        loss = handle.backward(lambda x=x, y=y: torch.nn.functional.mse_loss(ours(x), y))
        assert all(p.grad is None for p in ours.parameters())
        expected = torch.nn.functional.mse_loss(theirs(x), y)
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
        b.zero_grad()
        expected.backward()
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters()]))
        used = previous if clip == "previous" and previous is not None else norm
        previous = norm
        b.step(grad_scale=1.0 if max_norm is None else min(1.0, max_norm / (used + 1e-6)))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    handle.remove()
    ours(torch.randn(1, 64)).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("clip", ("two_pass", "previous"))
def test_step_in_backward_accumulates(clip):
    ours, theirs = network(), network()
    a, b = AdamW8bit(ours.parameters()), AdamW8bit(theirs.parameters())
    handle = step_in_backward(a, accumulate=3, max_norm=0.05, clip=clip)
    previous = None
    for scale in (1.0, 2.0**10):
        handle.loss_scale = scale
        micro = list(batches(3))
        handle.backward(*[lambda x=x, y=y: torch.nn.functional.mse_loss(ours(x), y) / 3 for x, y in micro])
        b.zero_grad()
        for x, y in micro:
            (torch.nn.functional.mse_loss(theirs(x), y) / 3).backward()
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters()]))
        used = previous if clip == "previous" and previous is not None else norm
        previous = norm
        b.step(grad_scale=min(1.0, 0.05 / (used + 1e-6)))
        assert float(handle.norm) == pytest.approx(norm, rel=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_step_in_backward_with_plain_backwards():
    ours, theirs = network(), network()
    a, b = AdamW8bit(ours.parameters()), AdamW8bit(theirs.parameters())
    step_in_backward(a, accumulate=2)
    for _ in range(2):
        for x, y in batches(2):
            torch.nn.functional.mse_loss(ours(x), y).backward()
        b.zero_grad()
        for x, y in batches(2):
            torch.nn.functional.mse_loss(theirs(x), y).backward()
        b.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_one_gradient_alive_at_a_time():
    net = torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(6)])
    opt = AdamW8bit(net.parameters())
    most = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda _: most.append(sum(q.grad is not None for q in net.parameters())))
    step_in_backward(opt).backward(lambda: net(torch.randn(4, 64)).square().sum())
    assert max(most) == 1


def test_bad_step_in_backward_is_named():
    net = network()
    opt = AdamW8bit(net.parameters())
    with pytest.raises(TypeError, match="opt must be"):
        step_in_backward(torch.optim.SGD(net.parameters(), lr=0.1))
    for bad, sentence in ((dict(accumulate=0), "accumulate"), (dict(max_norm=0), "max_norm"), (dict(clip="x"), "clip")):
        with pytest.raises(ValueError, match=sentence):
            step_in_backward(opt, **bad)


@pytest.mark.parametrize("form", (torch.contiguous_format, torch.channels_last))
def test_the_norm_of_a_large_gradient_in_16_bits_is_exact(form):
    """It is summed in parts; every element counts once."""
    p = torch.nn.Parameter(torch.randn(150, 64, 3, 3).bfloat16().contiguous(memory_format=form))
    handle = step_in_backward(AdamW8bit([p]), max_norm=1.0)
    weight = torch.randn(p.shape).bfloat16()
    handle.backward(lambda: (p * weight).sum())
    assert float(handle.norm) == pytest.approx(float(weight.double().norm()), rel=1e-5)


def test_two_passes_leave_everything_as_it_was_where_one_gradient_is_not_finite():
    net = network()
    opt = AdamW8bit(net.parameters())
    handle = step_in_backward(opt, max_norm=1.0)
    before = [p.detach().clone() for p in net.parameters()]
    net[0].weight.register_hook(lambda g: g * float("nan"))
    handle.backward(lambda: net(torch.ones(2, 64)).sum())
    assert int(handle.refused) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert untouched(opt)


@pytest.mark.parametrize("clip", ("two_pass", "previous"))
def test_accumulated_steps_of_an_unknown_norm_leave_everything_as_it_was_too(clip):
    net = network()
    opt = AdamW8bit(net.parameters())
    handle = step_in_backward(opt, accumulate=2, max_norm=1.0, clip=clip)
    before = [p.detach().clone() for p in net.parameters()]
    broken = net[0].weight.register_hook(lambda g: g * float("inf"))
    handle.backward(*[lambda: net(torch.ones(2, 64)).sum()] * 2)
    assert int(handle.refused) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert untouched(opt)
    broken.remove()
    handle.backward(*[lambda: net(torch.ones(2, 64)).sum()] * 2)
    assert not int(handle.refused) and not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", (1, 2))
def test_a_good_step_after_a_bad_first_one_is_clipped(accumulate):
    """No norm is known then: the trainer takes the bad one away, on a GPU right before the step that follows."""
    p = torch.nn.Parameter(torch.zeros(8))
    optimizer = AdamW8bit([p], lr=1e-3)
    handle = step_in_backward(optimizer, accumulate, 1.0, "previous")
    handle.backward(*[lambda: (p * float("inf")).sum()] * accumulate)
    handle.norm = None
    handle.backward(*[lambda: (p * 100 / accumulate).sum()] * accumulate)
    m = float(optimizer.state[p]["state1"].norm())
    assert m == pytest.approx(0.1, rel=1e-3)  # a tenth of a gradient of norm 1
