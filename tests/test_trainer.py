"""The loop: proof, resume, stops, bad numbers, processes that share a batch. Small runs on the embedded model."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from pcs_trainer.concept.attach import predict
from pcs_trainer.concept.loading import load_concept
from pcs_trainer.errors import TrainingStopped
from pcs_trainer.run_folder import checkpoints
from pcs_trainer.training.objective import Objective
from pcs_trainer.training.probe import Probe
from pcs_trainer.training.task import prepare
from pcs_trainer.training.trainer import Trainer
from trainer_cases import METHODS, SMALL, cache, pictures, trainer

__all__ = ["cache"]


def same(a, b):
    assert a.tensors.keys() == b.tensors.keys() and a.words.keys() == b.words.keys()
    assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)
    assert all(torch.equal(x, y) for w in a.words for x, y in zip(a.words[w], b.words[w], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_same_run_bit_for_bit(model, tmp_path, method):
    whole = trainer(model, method, steps=4, resolution=32).train()
    trainer(model, method, tmp_path, steps=2, resolution=32).train()
    resumed = trainer(model, method, tmp_path, steps=4, resolution=32).train(resume=True)
    same(whole, resumed)
    lines = (tmp_path / "logs" / "loss.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", *map(str, range(1, 5))]


@pytest.mark.slow
def test_accumulated_micro_batches_are_one_step(model):
    """Two micro-batches: the gradient is the mean of theirs, whichever way the optimizer is driven."""
    settings = dict(steps=2, accumulate=2, clip_norm=0.0, learning_rate=1e-5, resolution=32)
    concepts = [trainer(model, "dreambooth", step_in_backward=b, **settings).train() for b in (True, False)]
    for name, tensor in concepts[0].tensors.items():
        torch.testing.assert_close(tensor, concepts[1].tensors[name], rtol=1e-5, atol=1e-6)


def test_the_run_proves_itself_and_the_file_is_the_memory(model, tmp_path):
    events = []
    concept = trainer(model, out=tmp_path, steps=22, check_backend=True).train(on_event=events.append)
    said = [e.data["text"] for e in events if e.kind == "proof"]
    assert len(said) == 3
    assert "gradients agree" in said[0] and "all 18 trainable tensors have moved" in said[1] and "the file" in said[2]
    assert [e.step for e in events if e.kind == "proof"] == [0, 20, 22]
    assert [e.step for e in events if e.kind == "step"] == list(range(1, 23))
    assert {"loss", "smoothed", "subject", "lr", "its_per_second", "seconds_left", "peak_memory"} <= set(events[5].data)
    again = load_concept(tmp_path / "concept.safetensors", model)
    assert torch.equal(predict(model, [again], "a <mug> mug"), predict(model, [concept], "a <mug> mug"))
    assert concept.meta["steps"] == "22" and concept.meta["finished"] == "1"
    assert not any(layer.residuals for layer in model.unet.modules() if hasattr(layer, "residuals"))


@pytest.mark.slow
def test_a_stop_leaves_a_usable_concept_and_a_resume_goes_on(model, tmp_path):
    steps = []
    t = trainer(model, out=tmp_path, steps=8)
    concept = t.train(
        on_event=lambda e: steps.append(e.step) if e.kind == "step" else None, should_stop=lambda: len(steps) > 2
    )
    assert steps == [1, 2, 3] and concept.meta["finished"] == "0" and concept.meta["steps"] == "3"
    load_concept(tmp_path / "concept.safetensors", model)
    resumed = trainer(model, out=tmp_path, steps=8).train(resume=True)
    same(trainer(model, steps=8).train(), resumed)


@pytest.mark.slow
def test_a_resume_refuses_another_run(model, tmp_path):
    trainer(model, out=tmp_path, steps=2).train()
    with pytest.raises(ValueError, match=r"learning_rate was 0\.\d+ and is 0\.05"):
        trainer(model, out=tmp_path, steps=4, learning_rate=0.05).train(resume=True)
    other = Trainer(
        model, "personalized_residuals", pictures(seed=52), class_word="mug", out=tmp_path, **SMALL, steps=4
    )
    with pytest.raises(ValueError, match="other pictures"):
        other.train(resume=True)
    state = tmp_path / "checkpoint-2" / "state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"base": "feed:1", "base_name": "some/model"}))
    with pytest.raises(ValueError, match="some/model"):
        trainer(model, out=tmp_path, steps=4).train(resume=True)


@pytest.mark.slow
def test_the_last_checkpoints_are_kept(model, tmp_path):
    trainer(model, out=tmp_path, steps=7, checkpoint_every=2, keep=2).train()
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-7"]


@pytest.mark.slow
def test_three_bad_steps_end_the_run_with_the_last_good_state(model, tmp_path):
    t = trainer(model, out=tmp_path, steps=30)
    events = []

    def poison(event):
        events.append(event)
        if event.kind == "step" and event.step == 12:
            with torch.no_grad():
                run_parameters = t.trainable()
                next(iter(run_parameters.values())).fill_(float("nan"))

    with pytest.raises(TrainingStopped, match="not finite") as stopped:
        t.train(on_event=poison)
    concept = stopped.value.concept
    assert concept is not None and concept.meta["steps"] == "10"
    assert all(bool(torch.isfinite(x).all()) for x in concept.tensors.values())
    load_concept(tmp_path / "concept.safetensors", model)
    skipped = [e.data["text"] for e in events if e.kind == "warning"]
    assert sum("was skipped" in text and "array" in text for text in skipped) == 3


@pytest.mark.slow
@pytest.mark.parametrize("in_backward", [True, False])
def test_one_bad_step_changes_nothing_and_the_run_goes_on(model, in_backward, monkeypatch):
    honest, of_step, now = Objective.loss_of, Objective.of_step, []

    def noted(self, batch, step, micro):
        now.append(step)
        return of_step(self, batch, step, micro)

    def sometimes(self, given):
        total, parts = honest(self, given)
        return (total * float("inf"), parts) if now[-1] == 1 else (total, parts)

    events = []
    monkeypatch.setattr(Objective, "of_step", noted)
    monkeypatch.setattr(Objective, "loss_of", sometimes)
    t = trainer(model, "dreambooth", steps=4, step_in_backward=in_backward, learning_rate=1e-5)
    concept = t.train(on_event=events.append)
    assert [e.step for e in events if e.kind == "step"] == [1, 3, 4]
    assert all(bool(torch.isfinite(x).all()) for x in concept.tensors.values())


@pytest.mark.slow
def test_a_run_leaves_no_optimizer_on_the_model(model):
    """The text encoder stays when the UNet is read again: the next run must not be stepped by this one's optimizer."""
    settings = dict(steps=1, train_text_encoder=True, step_in_backward=True, prior_weight=0.0, probe_every=0)
    for _ in range(2):
        trainer(model, "dreambooth", clip="two_pass", learning_rate=1e-2, **settings).train()
        assert not any(p._post_accumulate_grad_hooks for p in model.text_encoder.parameters())


@pytest.mark.slow
def test_a_failed_preview_does_not_end_the_run(model, tmp_path):
    events = []
    t = trainer(model, out=tmp_path, steps=4, preview_every=2, preview_prompts=("a <mug> mug",), resolution=32)
    t.train(on_event=events.append)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "samples").write_text("a file where the folder should be")
    events.clear()
    t = trainer(model, out=tmp_path / "second", steps=1, preview_every=1, preview_prompts=("a <mug> mug",))
    t.train(on_event=events.append)
    assert any("preview failed" in e.data.get("text", "") for e in events if e.kind == "warning")
    assert events[-1].kind == "done"


@pytest.mark.slow
def test_several_concepts_train_together(model):
    both = [
        {"images": pictures(seed=61), "class_word": "mug", "token": "<one>"},
        {"images": pictures(seed=62), "class_word": "cat", "token": "<two>"},
    ]
    t = Trainer(model, "custom_diffusion", concepts=both, **SMALL | dict(batch=6), steps=2)
    assert {n for n in t.trainable() if n.startswith("word.")} == {"word.0.<one>", "word.0.<two>"}
    concept = t.train()
    assert set(concept.words) == {"<one>", "<two>"}
    with pytest.raises(ValueError, match="token of its own"):
        Trainer(model, "custom_diffusion", concepts=[both[0], both[1] | {"token": "<one>"}], **SMALL)
    with pytest.raises(ValueError, match="made for one word"):
        Trainer(model, "textboost", concepts=both, **SMALL)
    alike = Trainer(model, "dreambooth_lora", concepts=both, identifier="learned", **SMALL).learner
    first, second = alike.words.values()
    alike.restore()
    assert not torch.equal(first.rows[0], second.rows[0])  # words that do not train must not be the same words


@pytest.mark.slow
def test_pictures_of_several_classes_in_one_folder_need_captions(model, tmp_path):
    from PIL import Image

    for i, picture in enumerate(pictures()):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    both = [{"images": pictures(seed=61), "class_word": "mug"}, {"images": pictures(seed=62), "class_word": "cat"}]
    given = SMALL | dict(steps=2, batch=6, prior_folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"0\.png in .* has no caption"):
        Trainer(model, "custom_diffusion", concepts=both, **given).train()
    for i, text in enumerate(("a mug", "a cat")):
        (tmp_path / f"{i}.txt").write_text(text)
    Trainer(model, "custom_diffusion", concepts=both, **given).train()


def test_masks_weight_the_loss(model, tmp_path):
    from PIL import Image

    for i, picture in enumerate(pictures()):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        mask = Image.new("L", (64, 64))
        mask.paste(255, (16, 16, 48, 48))
        mask.save(tmp_path / f"{i}-mask.png")
    t = Trainer(model, "personalized_residuals", tmp_path, class_word="mug", **SMALL, steps=1)
    assert len(t.subjects[0].pictures) == 2
    masks = prepare(t.task, lambda kind, **data: None).bank.masks
    assert masks.shape == (2, 1, 16, 16) and float(masks.mean()) == pytest.approx(0.25, abs=0.02)
    t.learner.restore()


@pytest.mark.slow
def test_the_probe_tells_the_held_out_loss_and_the_drift_and_changes_nothing(model, tmp_path):
    """On noise that never changes: the loss falls, the class moves, and the run is the one without a probe."""
    events = []
    settings = dict(steps=30, learning_rate=8e-3, resolution=32)
    seen = trainer(model, out=tmp_path / "a", probe_every=10, **settings).train(on_event=events.append)
    same(seen, trainer(model, probe_every=0, **settings).train())
    probes = [e for e in events if e.kind == "probe"]
    assert [e.step for e in probes] == [10, 20, 30]
    at_first = re.search(r"\(([\d.]+) at first", probes[0].data["text"])[1]
    assert probes[-1].data["held_out"] < float(at_first)
    assert all(0 < e.data["drift"] < 1 for e in probes)
    lines = (tmp_path / "a" / "logs" / "probe.csv").read_text().splitlines()
    assert lines[0] == "step,held_out,drift" and len(lines) == 4
    again = trainer(model, out=tmp_path / "a", probe_every=20, **settings | dict(steps=40))
    again.train(on_event=events.append, resume=True)
    later = [e for e in events if e.kind == "probe"][3:]
    assert [e.step for e in later] == [40] and f"({at_first} at first)" in later[0].data["text"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_probe_starts_at_no_drift(model, method):
    objective = trainer(model, method).objective()
    assert Probe(objective).measure()[1] == 0
    objective.learner.restore()


def test_the_gradients_are_compared_on_one_image_of_each_kind(model):
    objective = trainer(model, "dreambooth_lora", batch=3).objective()
    batch = objective.batch(0, 0)
    first = batch.smallest(32)
    assert len(batch.t) == 6 and len(first.t) == 2 and first.subjects == 1
    assert torch.equal(first.latents, batch.latents[[0, 3]]) and torch.equal(first.t, batch.t[[0, 3]])
    assert first.prompts == [batch.prompts[0], batch.prompts[3]]
    objective.learner.restore()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(images=[None]), "expected a file.* got None"),
        (dict(images=5), "images must be a folder"),
        (dict(concepts="x"), "concepts must be a list of dicts"),
        (dict(concepts=[]), "concepts must be a list of dicts"),
        (dict(concepts=[{"class_word": "mug"}]), r"concepts\[0\] has no images"),
        (dict(images=pictures(1), out=5), "out must be the path of a folder"),
    ],
)
def test_what_cannot_be_trained_on_is_one_sentence(model, wrong, said):
    with pytest.raises(ValueError, match=said) as error:
        Trainer(model, class_word="mug", **wrong)
    assert "\n" not in str(error.value)


def test_a_second_training_on_a_model_that_one_holds_is_refused(model):
    first = trainer(model)
    first.trainable()
    try:
        with pytest.raises(ValueError, match="another training has its tensors on"):
            trainer(model, "custom_diffusion").trainable()
    finally:
        first.learner.restore()


@pytest.mark.slow
def test_a_training_that_steps_in_its_backward_leaves_no_hook_on_the_model(model):
    """Custom Diffusion trains the model's own parameters: a hook that stays would step them in the next training."""
    settings = dict(steps=2, step_in_backward=True, learning_rate=1e-3)
    first = trainer(model, "custom_diffusion", **settings).train()
    second = trainer(model, "custom_diffusion", **settings).train()
    same(first, second)


@pytest.mark.slow
def test_the_log_ends_where_the_disk_is_full_and_the_training_does_not(model, tmp_path, monkeypatch):
    """What /dev/full and a quota do: every write fails, here from the third step on."""
    events = []

    def fill(event):
        events.append(event)
        if event.kind == "step" and event.step == 2:
            monkeypatch.setattr("pcs_trainer.training.log.csv.writer", full)
            monkeypatch.setattr(torch, "save", broken)

    def full(_file):
        raise OSError(28, "No space left on device")

    def broken(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    concept = trainer(model, out=tmp_path, steps=4).train(on_event=fill)
    told = [e.data["text"] for e in events if e.kind == "warning"]
    assert len(told) == 2 and "the log" in told[0] and "No space" in told[0] and "the checkpoint" in told[1]
    assert concept.meta["finished"] == "1" and (tmp_path / "concept.safetensors").is_file()
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("checkpoint-*"))


def test_class_images_are_the_frozen_models_where_what_trains_is_on_the_model_already(model):
    settings = dict(prior_weight=1.0, init="both_random")
    early = trainer(model, "dreambooth_lora", **settings | dict(prior_steps=3))  # not what the cache holds
    for p in early.trainable().values():
        p.data.add_(1.0)
    drawn = early.objective().data.prior.moments.mean
    early.learner.restore()
    assert torch.equal(drawn, drawn_anew(model, settings))


def drawn_anew(model, settings):
    """The class images of three steps, by a trainer that starts with nothing on the model and an empty cache."""
    import tempfile

    before = os.environ["PCS_CACHE"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PCS_CACHE"] = folder
        t = trainer(model, "dreambooth_lora", **settings | dict(prior_steps=3))
        found = t.objective().data.prior.moments.mean
        t.learner.restore()
    os.environ["PCS_CACHE"] = before
    return found
