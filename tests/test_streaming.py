"""Weights that pass through a ring: values whatever the copies' delays, room, order, and what a copy waits for."""

import itertools
import random
import threading
import time
from queue import Queue

import pytest
import torch

import pcs_kernels
from pcs_kernels import StreamedWeight, WeightRing, streaming
from tests import needs


class Delayed:
    """Copies by a thread that takes its time: until one is done, NaN stands where it will be.

    The device's work is the host's here, so a mark is a number; each copy must wait for the last use of what it
    replaces.
    """

    def __init__(self, seed=0):
        self.random, self.orders, self.marks = random.Random(seed), Queue(), 0
        self.after, self.copied = [], 0
        threading.Thread(target=self.work, daemon=True).start()

    def work(self):
        while True:
            pairs, done = self.orders.get()
            time.sleep(self.random.choice((0, 0, 0.002)))
            for to, given in pairs:
                to.copy_(given)
            done.set()

    def copy(self, pairs, after):
        for to, _ in pairs:
            to.fill_(float("nan") if to.is_floating_point() else {torch.int8: -1, torch.int16: 0x7FC0}[to.dtype])
        self.after += after
        self.copied += sum(to.nbytes for to, _ in pairs)
        done = threading.Event()
        self.orders.put((pairs, done))
        return done

    def wait(self, ready):
        assert ready.wait(10)

    finish = wait

    def uses(self, block):
        self.block = block

    def mark(self):
        self.marks += 1
        return self.marks


def layers_of(ring, int8=False, sizes=(64, 96, 32, 128, 64, 80)):
    """Linear layers of several sizes, resident and streamed, each [n, 64] and back to 64 features."""
    torch.manual_seed(0)
    made = []
    for n in sizes:
        for shape in ((n, 64), (64, n)):
            w = torch.randn(shape) / 8
            whole = pcs_kernels.quantize_weight(w) if int8 else w
            made.append((whole, StreamedWeight(ring, *whole) if int8 else StreamedWeight(ring, w)))
    return made


def run(weights, x):
    """(output, gradient of x) of all layers one after the other."""
    y = x.detach().clone().requires_grad_()
    out = y
    for w in weights:
        out = pcs_kernels.frozen_linear(out, w, None, pack=False).tanh()
    out.square().sum().backward()
    return out.detach(), y.grad


@pytest.mark.parametrize("int8", (False, True), ids=("full", "int8"))
@pytest.mark.parametrize("seed", range(3))
def test_no_weight_is_used_before_its_copy_is_there(int8, seed):
    """And none is overwritten while it is: what replaces a weight waits for the moment at which it was used last."""
    copier = Delayed(seed)
    ring = WeightRing("cpu", 90_000 if not int8 else 25_000, copier)
    pairs = layers_of(ring, int8)
    total = sum(s.size for _, s in pairs)
    assert ring.size < total / 2
    taken, used = ring.take, set()

    def checked(weight):
        before, copier.after = dict(ring._here), []
        tensors = taken(weight)
        for place in (place for other, place in before.items() if ring._here.get(other) is not place):
            if place in used:
                assert place.used and set(place.used) <= set(copier.after), "replaced while it may be in use"
                waited.append(place)
        used.add(ring._here[weight])
        places = sorted(ring._here.values(), key=lambda p: p.at)
        assert all(a.at + a.size <= b.at for a, b in itertools.pairwise(places))
        assert places[-1].at + places[-1].size <= ring.size == ring._block.nbytes
        return tensors

    ring.take = checked
    waited = []
    for step in range(3):
        x = torch.randn(5, 64)
        wanted = run([w for w, _ in pairs], x)
        found = run([s for _, s in pairs], x)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
        if step == 1:
            ring.missed = 0
    assert ring.missed == 0, "from the second step on, each copy was ordered ahead"
    assert len(waited) > len(pairs), "copies that replace something wait"


def test_a_weight_stays_until_the_next_is_taken_and_an_order_that_changes_is_learned():
    ring = WeightRing("cpu", 70_000, Delayed())
    pairs = layers_of(ring)
    for order in (range(12), range(11, -1, -1), (0, 3, 0, 5, 5, 2, 7)):
        for _ in range(3):
            for i in order:
                whole, streamed = pairs[i]
                assert torch.equal(streamed.take(), whole)


def test_a_weight_that_has_changed_is_copied_again():
    ring = WeightRing("cpu", 1 << 16)
    weight = torch.randn(4, 8)
    streamed = StreamedWeight(ring, weight)
    assert torch.equal(streamed.take(), weight)
    weight.mul_(2)
    assert torch.equal(streamed.take(), weight)
    other = StreamedWeight(ring, torch.randn(4, 8))
    for _ in range(3):
        assert torch.equal(streamed.take(), weight) and torch.equal(other.take(), other.sources[0])
    weight.add_(1)  # on its way already, with the values of before
    assert torch.equal(streamed.take(), weight)
    ring.forget()
    assert ring._block is None and torch.equal(streamed.take(), weight)


def test_a_ring_is_given_back_when_its_copies_are_there_and_waits_for_what_had_its_memory():
    copier = Delayed()
    ring = WeightRing("cpu", 70_000, copier)
    pairs = layers_of(ring)
    for _ in range(2):
        for _, streamed in pairs:
            streamed.take()
    ordered = [place.ready for place in ring._here.values()]
    assert copier.marks and 1 in copier.after, "the first mark is the block's own"
    ring.forget()
    assert all(done.is_set() for done in ordered)


def test_a_weight_larger_than_the_ring_is_refused():
    with pytest.raises(ValueError, match=r"a weight of 4096 bytes does not fit a ring of 1000. Fix"):
        StreamedWeight(WeightRing("cpu", 1000), torch.zeros(32, 32))


def cases():
    image = torch.randn(2, 64, 6, 6).contiguous(memory_format=torch.channels_last)
    rows, down, up = torch.randn(3, 64), torch.randn(2, 64), torch.randn(32, 2)
    yield torch.randn(32, 64, 3, 3), lambda w, x: pcs_kernels.frozen_conv2d(x, w), image
    yield torch.randn(32, 64, 3, 3), lambda w, x: pcs_kernels.frozen_conv2d(x, w, stride=2), image
    yield torch.randn(32, 64), lambda w, x: pcs_kernels.frozen_linear(x, w), rows
    yield torch.randn(32, 64, 1, 1), lambda w, x: pcs_kernels.lowrank_residual(x, w, None, down, up), rows
    yield torch.randn(32, 64), lambda w, x: pcs_kernels.lowrank_residual(x, w, None, down, up), rows


@pytest.mark.parametrize("backend", needs.CPU_BACKENDS)
@pytest.mark.parametrize("case", range(5))
def test_each_op_takes_a_streamed_weight_and_keeps_none_of_it(case, backend):
    weight, call, x = list(cases())[case]
    if weight.dim() == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    ring = WeightRing("cpu", 1 << 20)
    other = StreamedWeight(ring, torch.zeros(4, 4))
    for whole in (weight, pcs_kernels.quantize_weight(weight)):
        streamed = StreamedWeight(ring, *whole) if isinstance(whole, tuple) else StreamedWeight(ring, whole)
        found, kept = {}, []
        with pcs_kernels.backend(backend), pcs_kernels.packing("none"):
            for name, w in (("whole", whole), ("streamed", streamed)):
                given = x.clone(memory_format=torch.preserve_format).requires_grad_()
                with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((name, t)) or t, lambda t: t):
                    y = call(w, given)
                other.take()
                y.sum().backward()
                with torch.no_grad():
                    found[name] = y.detach(), given.grad, call(w, x)
        for a, b in zip(found["whole"], found["streamed"], strict=True):
            assert torch.equal(a, b)
        inside = {t.untyped_storage().data_ptr() for n, t in kept if n == "streamed"}
        assert ring._block.data_ptr() not in inside


def test_a_trained_bias_is_refused_as_elsewhere():
    streamed = StreamedWeight(WeightRing("cpu", 1 << 16), torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"bias requires a gradient, which frozen_linear never computes"):
        pcs_kernels.frozen_linear(torch.randn(2, 8), streamed, torch.zeros(4, requires_grad=True))


def test_memory_that_cannot_be_pinned_is_said_once(monkeypatch):
    def refused(_):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refused)
    monkeypatch.setattr("pcs_kernels._fallback._told", set())
    with pytest.warns(RuntimeWarning, match=r"no pinned memory.*out of memory.*hold up the host") as told:
        for _ in range(2):
            assert streaming.on_the_host(torch.ones(3), torch.device("cuda")).sum() == 3
    assert len(told) == 1


def test_weights_used_first_in_inference_mode_serve_training_too():
    ring = WeightRing("cpu", 200_000)
    both, x = layers_of(ring), torch.randn(3, 64)
    with torch.inference_mode():
        out = x
        for _, streamed in both:
            out = pcs_kernels.frozen_linear(out, streamed, None, pack=False)
    found, wanted = run([s for _, s in both], x), run([w for w, _ in both], x)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_weight_with_gaps_takes_its_own_room_alone():
    ring = WeightRing("cpu", 20_000)
    base = torch.randn(64, 64)
    weights = [base[:, :32], torch.randn(64, 32), base[::2].repeat(2, 1)[:, ::2], torch.randn(1, 32).expand(64, 32)]
    streamed = [StreamedWeight(ring, w) for w in weights]
    for _ in range(3):
        for w, s in zip(weights, streamed, strict=True):
            assert torch.equal(s.take(), w)


def test_a_source_replaced_twice_is_copied_again():
    """Memory that was freed may have the address of what a weight had before."""
    ring, p = WeightRing("cpu", 1_000_000), torch.nn.Parameter(torch.zeros(1000), requires_grad=False)
    streamed = StreamedWeight(ring, p)
    for i in range(50):
        for value in (2 * i, 2 * i + 1):
            p.data = torch.full((1000,), float(value))
        assert streamed.take()[0] == 2 * i + 1


def test_what_is_no_ring_and_what_trains_is_refused():
    with pytest.raises(ValueError, match=r"size must be a number of bytes, not -5"):
        WeightRing("cpu", -5)
    with pytest.raises(TypeError, match=r"a source must be a torch\.Tensor, not list"):
        StreamedWeight(WeightRing("cpu", 100), [1.0])
    trains = StreamedWeight(WeightRing("cpu", 1000), torch.nn.Parameter(torch.ones(4, 4)))
    with pytest.raises(ValueError, match="weight requires a gradient, which frozen_linear never computes"):
        pcs_kernels.frozen_linear(torch.ones(1, 4), trains, None)
