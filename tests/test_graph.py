"""A recorded step is the eager step: the same numbers, with new pictures, noise, rates and random bits each time."""

import pytest
import torch
from pcs_trainer import load_model
from pcs_trainer.errors import NotTrained
from pcs_trainer.training import device_step, graph
from pcs_trainer.training.probe import Probe
from replaying import Recorder
from trainer_cases import METHODS, cache, trainer  # noqa: F401

STEPS = 6  # two of them eager, one recorded, three replayed

# The other methods train by the same lines as one of these.
CASES = [(method, {}) for method in ("personalized_residuals", "textboost", "textual_inversion")] + [
    ("dreambooth", {"step_in_backward": True, "clip": "two_pass"}),
    ("dreambooth", {"step_in_backward": True, "clip_norm": 0.0, "prior": "own"}),
    ("personalized_residuals", {"accumulate": 2, "lr_schedule": "cosine", "warmup": 2, "snr_gamma": 5.0}),
    ("custom_diffusion", {"prior": "own", "batch": 2}),
    ("textboost", {"variant": "v1", "preservation_weight": 0.1, "batch": 2, "augment": False, "template": "a {token}"}),
]


def trained(method, settings, dtype, recorder, monkeypatch):
    monkeypatch.setattr(device_step, "recorder_for", lambda *_: recorder)
    model = load_model("tiny", dtype=dtype)
    made = []
    real = graph.Replayed.__init__
    monkeypatch.setattr(graph.Replayed, "__init__", lambda self, *a: (real(self, *a), made.append(self))[0])
    losses = []
    run = trainer(model, method, steps=STEPS, probe_every=0, resolution=32, **settings)
    concept = run.train(on_event=lambda e: losses.append(e.data["loss"]) if e.kind == "step" else None)
    monkeypatch.undo()
    return concept, losses, made[0]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), CASES)
def test_replayed_steps_are_the_eager_ones(method, settings, monkeypatch):
    if method == "textual_inversion" and not settings:
        settings = {"batch": 2}
    eager, losses, _ = trained(method, settings, torch.bfloat16, None, monkeypatch)
    replayed, same, steps = trained(method, settings, torch.bfloat16, Recorder(), monkeypatch)
    assert steps.replays >= 2 and len(set(losses)) == STEPS
    assert same == losses
    assert eager.tensors.keys() == replayed.tensors.keys()
    assert all(torch.equal(x, replayed.tensors[name]) for name, x in eager.tensors.items())
    for word, rows in eager.words.items():
        assert all(torch.equal(a, b) for a, b in zip(rows, replayed.words[word], strict=True))


def test_memory_that_a_recorded_step_holds_is_given_up_where_it_is_needed(monkeypatch):
    monkeypatch.setattr(device_step, "recorder_for", lambda *_: Recorder())
    calls = []

    def measure(self):
        calls.append(self)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return 0.5, 0.1

    monkeypatch.setattr(Probe, "measure", measure)
    events = []
    trainer(load_model("tiny"), steps=5, probe_every=4).train(on_event=events.append)
    assert len(calls) == 3 and [e.step for e in events if e.kind == "probe"] == [4, 5]


def test_a_recording_that_computes_something_else_ends_the_run(monkeypatch):
    class Stale(Recorder):
        def record(self, run):
            replay, result = super().record(run)
            kept = result.clone()
            return lambda: (replay(), result.copy_(kept)), result

    monkeypatch.setattr(device_step, "recorder_for", lambda *_: Stale())
    with pytest.raises(NotTrained, match="graph=off"):
        trainer(load_model("tiny"), steps=6, probe_every=0).train()


def test_a_step_that_cannot_be_recorded_runs_eagerly_and_says_so(monkeypatch):
    class Broken(Recorder):
        def record(self, run):
            super().record(run)
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    events = []
    monkeypatch.setattr(device_step, "recorder_for", lambda *_: Broken())
    run = trainer(load_model("tiny"), steps=5, probe_every=0)
    run.train(on_event=events.append)
    said = [e.data["text"] for e in events if e.kind == "warning"]
    assert len([text for text in said if "without a CUDA graph" in text]) == 1
    assert [e.step for e in events if e.kind == "step"] == [1, 2, 3, 4, 5]


def test_after_memory_was_given_up_eager_steps_come_first_again():
    """Gradients have new places then, and what a recording reads of them is made in an eager step."""
    done = []

    class Settled:
        is_settled = True

        def recorded(self):
            pass

        forget = recorded

    class Noted:
        runs = True

        def record(self, run):
            done.append("record")
            return (lambda: None), run()

    def run(given):
        done.append("run")
        return given.sum()

    replayed = graph.Replayed(run, Noted(), lambda text: None, Settled())
    for _ in range(graph.WARM + 2):
        replayed(torch.ones(2))
    assert done == ["run"] * graph.WARM + ["record", "run"] and replayed.forget()
    done.clear()
    for _ in range(graph.WARM + 1):
        replayed(torch.ones(2))
    assert done == ["run"] * graph.WARM + ["record", "run"]
