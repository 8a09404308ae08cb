"""param_groups of the 8-bit optimizer that are edited by hand, as torch's own optimizers allow."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from pcs_kernels.optim import AdamW8bit, adamw8bit, step_in_backward


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(8))


def moved_by(opt: AdamW8bit, *ps: torch.nn.Parameter) -> list[bool]:
    """Which of them a step on gradients of ones changes."""
    before = [p.detach().clone() for p in ps]
    for p in ps:
        p.grad = torch.ones(8)
    opt.step()
    return [not torch.equal(a, p) for a, p in zip(before, ps, strict=True)]


def steps(opt: AdamW8bit) -> list[int]:
    """Counts, in the order in which the groups hold the parameters."""
    return [state["step"] for _, state in sorted(opt.state_dict()["state"].items())]


def test_an_appended_parameter_trains_and_begins_at_step_1():
    a, b = parameter(), parameter()
    opt = AdamW8bit([a])
    moved_by(opt, a)
    opt.param_groups[0]["params"].insert(0, b)
    assert moved_by(opt, a, b) == [True, True] and steps(opt) == [1, 2]


def test_a_replaced_parameter_gives_its_place_to_the_new_one():
    a, b = parameter(), parameter()
    opt = AdamW8bit([a])
    moved_by(opt, a)
    opt.param_groups[0]["params"][0] = b
    assert moved_by(opt, a, b) == [False, True] and steps(opt) == [1]


def test_a_removed_parameter_stays_and_goes_on_where_it_was_once_it_is_back():
    a, b = parameter(), parameter()
    opt = AdamW8bit([a, b])
    moved_by(opt, a, b)
    opt.param_groups[0]["params"] = [b]
    assert moved_by(opt, a, b) == [False, True] and steps(opt) == [2]
    opt.param_groups[0]["params"].append(a)
    assert moved_by(opt, a, b) == [True, True] and steps(opt) == [3, 2]


def test_a_parameter_moved_to_another_group_takes_its_rate_and_keeps_its_count():
    a, b = parameter(), parameter()
    opt = AdamW8bit([dict(params=[a]), dict(params=[b], lr=0.0)])
    moved_by(opt, a)
    opt.param_groups[0]["params"], opt.param_groups[1]["params"] = [b], [a]
    assert moved_by(opt, a, b) == [False, True] and steps(opt) == [1, 2]


def test_a_step_in_backward_names_a_group_that_no_longer_holds_the_parameter():
    a, b = parameter(), parameter()
    opt = AdamW8bit([dict(params=[a]), dict(params=[b], lr=0.0)])
    handle = step_in_backward(opt)
    handle.backward(lambda: (a + b).sum())
    opt.param_groups[0]["params"], opt.param_groups[1]["params"] = [b], [a]
    with pytest.raises(ValueError, match="the parameter group that holds it"):
        handle.backward(lambda: (a + b).sum())


def test_an_update_after_an_edit_has_a_place_for_the_new_parameter():
    a, b = parameter(), parameter()
    opt = AdamW8bit([a])
    moved_by(opt, a)
    opt.param_groups[0]["params"].append(b)
    b.grad = torch.ones(8)
    opt.update(b, opt.param_groups[0])
    assert b.any() and steps(opt)[1] == 1


def test_a_rate_that_is_a_tensor_may_be_changed_in_place():
    a, rate = parameter(), torch.tensor(1e-2)
    opt = AdamW8bit([a], weight_decay=0.0)
    opt.param_groups[0]["lr"] = rate
    assert moved_by(opt, a) == [True]
    rate.zero_()
    assert moved_by(opt, a) == [False]


def test_an_edit_is_refused_in_a_capture_and_captured_numbers_stay(monkeypatch):
    """A graph reads and counts in the rows that it was captured with whenever it is replayed."""
    a, b = parameter(), parameter()
    opt = AdamW8bit([a])
    moved_by(opt, a)
    rows = weakref.ref(opt._numbers[a.device])
    with monkeypatch.context() as capture:
        capture.setattr(adamw8bit, "capturing", lambda: True)
        moved_by(opt, a)
        opt.param_groups[0]["params"].append(b)
        with pytest.raises(RuntimeError, match=r"param_groups have changed\. Fix: take one step"):
            moved_by(opt, a, b)
    moved_by(opt, a, b)
    gc.collect()
    assert rows() is not None and opt._numbers[a.device] is not rows()


def test_the_table_of_a_captured_graph_stays_when_the_next_one_is_made():
    """A graph reads its table whenever it is replayed; an eager step with gradients elsewhere makes another."""
    pytest.importorskip("triton")
    from pcs_kernels.ops.adamw8bit.many import Many

    many, device = Many(None, False), torch.device("cpu")
    many._fit([(0, 0, 0, 0, 0, 0, 8, 0, 0)], device, captured=False)
    many._fit([(16, 0, 0, 0, 0, 0, 8, 0, 0)], device, captured=True)
    tables = [weakref.ref(t) for t in many._table]
    many.send()
    many._fit([(32, 0, 0, 0, 0, 0, 8, 0, 0)], device, captured=False)
    gc.collect()
    assert all(table() is not None for table in tables)


@pytest.mark.parametrize(
    "copied", (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))), ids=("copy", "pickle")
)
def test_a_copy_keeps_the_count_of_a_parameter_that_was_taken_out(copied):
    ps = [parameter(), parameter()]
    opt = AdamW8bit(ps)
    moved_by(opt, *ps)
    opt.param_groups[0]["params"] = ps[1:]
    for its, (a, b) in ((opt, ps), copied((opt, ps))):
        moved_by(its, a, b)
        its.param_groups[0]["params"].append(a)
        assert moved_by(its, a, b) == [True, True] and steps(its) == [3, 2]


@pytest.mark.parametrize(
    "copied", (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))), ids=("copy", "pickle")
)
def test_a_copied_optimizer_goes_on_as_its_original_would(copied):
    """As torch's own optimizers do; a count that began anew would correct the averages of step 3 as those of step 1."""
    torch.manual_seed(0)
    values = [torch.randn(64, 80).bfloat16(), torch.randn(7)]
    params = [torch.nn.Parameter(v) for v in values]
    optimizer = AdamW8bit(params, lr=1e-2, block_size=64, seed=3)
    gradients = [[torch.randn(p.shape).to(p.dtype) for p in params] for _ in range(4)]

    def step(its, optimizer, given):
        for p, g in zip(its, given, strict=True):
            p.grad = g.clone()
        optimizer.step()

    for given in gradients[:2]:
        step(params, optimizer, given)
    others, other = copied((params, optimizer))
    for given in gradients[2:]:
        step(params, optimizer, given)
        step(others, other, given)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert [s["step"] for s in other.state_dict()["state"].values()] == [4, 4]
