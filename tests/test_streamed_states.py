"""Optimizer states that wait in the machine's memory: the same numbers whatever the delays of their copies."""

import copy
import itertools
import pickle
import threading
import time

import pytest
import torch
from pcs_trainer import load_concept, load_model
from pcs_trainer.cli.entry import main
from pcs_trainer.memory import whole_run
from pcs_trainer.memory.whole_run import plan_run
from pcs_trainer.training.trainer import Trainer
from second_device import NAME, calls, folder, model, one_thread, twin
from test_streaming import Delayed
from torch import nn
from trainer_cases import cache, pictures, small_for

from pcs_kernels.optim import AdamW8bit, step_in_backward
from pcs_kernels.optim.away import RING, ring_bytes

__all__ = ["cache", "calls", "folder", "model", "one_thread", "twin"]


class Late(Delayed):
    """Waits for what each copy must come after; until it is done, wrong bytes stand where it will be."""

    def work(self):
        while True:
            pairs, after, done = self.orders.get()
            for moment in after:
                assert moment.wait(10)
            for to, _ in pairs:
                to.fill_(float("nan") if to.is_floating_point() else 77)
            time.sleep(self.random.choice((0, 0, 0.001, 0.003)))
            for to, given in pairs:
                to.copy_(given)
            done.set()

    def copy(self, pairs, after):
        done = threading.Event()
        self.orders.put((pairs, after, done))
        return done

    def mark(self):
        now = threading.Event()
        now.set()  # the device's work is the host's here
        return now


def network():
    """Tensors of several sizes, one channels-last, one too small to be coded."""
    torch.manual_seed(0)
    widths = (16, 64, 48, 64, 32, 64, 64, 48, 64, 16)
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)]
    made = nn.Sequential(*layers).to(torch.bfloat16)
    layers[1].weight.data = layers[1].weight.data.contiguous(memory_format=torch.channels_last)
    return made


def trained(states, seed=None, in_backward=True, steps=6, opt=None, net=None, first=0):
    """A network after some steps, and its optimizer."""
    net = network() if net is None else net
    opt = AdamW8bit(net.parameters(), lr=1e-2, states=states) if opt is None else opt
    if seed is not None:
        opt.prepare()
        (ring,) = opt._away._rings.values()
        ring.copier, ring.outward = Late(seed), Late(seed + 100)
    handle = step_in_backward(opt, 1, 1.0, "previous") if in_backward else None
    for step in range(first, first + steps):
        x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(step)).bfloat16()

        def loss():
            return (net(x).float() - 1).square().mean()

        if handle is not None:
            handle.backward(loss)
            continue
        loss().backward()
        opt.step()
        opt.zero_grad()
    if handle is not None:
        handle.remove()
    return net, opt


def same(ours, theirs):
    (net, opt), (other, its) = ours, theirs
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    saved, wanted = opt.state_dict(), its.state_dict()
    for key, state in wanted["state"].items():
        assert state.keys() == saved["state"][key].keys()
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(saved["state"][key][name]), torch.as_tensor(value)), (key, name)


@pytest.mark.parametrize("in_backward", (True, False), ids=("in the backward", "after it"))
@pytest.mark.parametrize("seed", range(3))
def test_delayed_copies_change_no_bit(seed, in_backward):
    """A state is never used before its copy is there, fetched before it went back, or overwritten on its way back."""
    same(trained("streamed", seed, in_backward), trained("device", None, in_backward))


def test_the_ring_is_all_that_the_device_holds_and_runs_ahead():
    net, opt = trained("streamed")
    (ring,) = opt._away._rings.values()
    largest = max(p.numel() for p in net.parameters())
    assert ring.size == ring_bytes(largest) < RING * (2 * largest + 8 * largest // 256 + 2000)
    coded = [state for state in opt.state.values() if state["state1"].dtype == torch.uint8]
    assert len(coded) == 9 and all(state["state1"].device.type == "cpu" for state in coded)
    assert ring.taken == 9 * 6 and ring.missed <= 9 + 3  # the first step's, and what comes after it the first time


def test_what_stays_in_the_ring_is_not_copied_again():
    few = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
    )
    _, opt = trained("streamed", net=few.bfloat16(), steps=4)
    (ring,) = opt._away._rings.values()
    assert (ring.taken, ring.missed) == (12, 3)


def test_saved_copied_and_pickled_states_go_on_in_either_kind():
    wanted = trained("device", steps=6, in_backward=False)
    for first, then in (("device", "streamed"), ("streamed", "device"), ("streamed", "streamed")):
        net, opt = trained(first, 0 if first == "streamed" else None, steps=3, in_backward=False)
        other = AdamW8bit(net.parameters(), lr=1e-2, states=then)
        other.load_state_dict(opt.state_dict())
        same(trained(then, opt=other, net=net, steps=3, first=3, in_backward=False), wanted)
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        net, opt = copied(trained("streamed", steps=3, in_backward=False))
        assert opt.states == "streamed"
        same(trained("streamed", opt=opt, net=net, steps=3, first=3, in_backward=False), wanted)


def test_a_larger_parameter_that_comes_later_has_a_larger_ring():
    net, opt = trained("streamed", 0, steps=2)
    late = nn.Parameter(torch.ones(200_000))
    opt.add_param_group({"params": [late]})
    late.grad = torch.ones_like(late)
    opt.step()
    (ring,) = opt._away._rings.values()
    assert ring.size == ring_bytes(200_000) and late.max() < 1
    same_again = AdamW8bit([*net.parameters()], states="streamed")
    with pytest.raises(ValueError, match="parameter groups"):
        same_again.load_state_dict(opt.state_dict())


def test_states_replaced_by_hand_are_used_and_those_that_are_gone_let_go():
    found = {}
    for states in ("device", "streamed"):
        p = nn.Parameter(torch.ones(100, 100))
        opt = AdamW8bit([p], lr=1e-2, states=states)
        for step in range(30):
            p.grad = torch.full_like(p, 1.0 + step % 3)
            opt.step()
            if step == 10:
                opt.state[p]["absmax2"] = opt.state[p]["absmax2"] * 4
            if step > 15:
                opt.state.clear()
        found[states] = p.detach().clone()
    assert torch.equal(found["device"], found["streamed"])
    (ring,) = opt._away._rings.values()
    assert len(opt._away._of) <= 3 and len(ring._next) <= 4


def test_what_cannot_be_is_refused_in_one_sentence(capsys):
    with pytest.raises(ValueError, match='states must be "device" or "streamed", not \'disk\''):
        AdamW8bit([nn.Parameter(torch.ones(3))], states="disk")
    own = load_model("tiny")
    with pytest.raises(ValueError, match=r"states='streamed' needs optimizer='adamw8bit'"):
        Trainer(own, "dreambooth_lora", pictures(), class_word="mug", states="streamed", optimizer="adamw")
    assert main(["plan", "--states", "disk"]) == 2
    assert "unknown place 'disk'; choose from device, streamed" in capsys.readouterr().err


def ran(folder, out, states, steps=2, resume=False):
    own = load_model(folder, torch.float32, device=NAME)
    options = small_for("dreambooth", steps=steps, batch=1, prior_images=2, prior_steps=2, check_backend=False)
    Trainer(own, "dreambooth", pictures(), class_word="mug", out=out, states=states, **options).train(resume=resume)
    return load_concept(out / "concept.safetensors").tensors


@pytest.mark.slow
def test_a_run_of_a_whole_network_is_the_same_bit_for_bit(folder, tmp_path):
    """On a device of its own, with a resume in the other kind."""
    wanted = ran(folder, tmp_path / "device", "device")
    ran(folder, tmp_path / "streamed", "device", steps=1)
    found = ran(folder, tmp_path / "streamed", "streamed", resume=True)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.slow
def test_the_plan_streams_the_states_of_a_whole_network_that_does_not_fit(monkeypatch):
    asked = dict(model="tiny", method="dreambooth", resolution=32, report=False, offload=False)
    small = plan_run(**asked, budget="0.1GB")
    assert not small.fits and small.states == "device"  # nothing is won by streaming so little
    monkeypatch.setattr(whole_run, "LARGE", 0)
    step = {phase.name: phase.bytes for phase in plan_run(**asked, batch=1).phases}["training step"]
    whole, less = (plan_run(**asked, batch=1, budget=step - saved) for saved in (0, 5_000_000))
    assert whole.states == "device" and less.states == less.settings["states"] == "streamed"
    states = [plan.step.components["optimizer state"] for plan in (whole, less)]
    trained = sum(p.numel() for p in load_model("tiny").unet.parameters())
    assert states[0] > 2 * trained > 2 * states[1]
    ram = {phase.name: phase.ram for phase in less.phases}
    assert ram["training step"] - ram["gradient check"] > 2 * trained  # the states, in pinned memory
