"""A run that ended before its first checkpoint begins anew; signals are the caller's; a full disk loses nothing."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from pcs_trainer import NotSaved, Trainer, load_concept
from pcs_trainer.cli import entry as cli
from pcs_trainer.concept.concept import Concept
from pcs_trainer.run_folder import BEGUN, checkpoints
from pcs_trainer.training.checkpoint import begun_with
from trainer_cases import SMALL, cache, pictures, trainer

__all__ = ["cache"]
PHOTOS = Path(__file__).parents[1] / "examples" / "photos"


class Killed(Exception):
    """Ends a run in the middle of it."""


def ended_early(model, out: Path, **settings) -> None:
    """A run that has taken two steps and written no checkpoint."""

    def kill(event):
        if event.kind == "step" and event.step == 2:
            raise Killed

    with pytest.raises(Killed):
        trainer(model, out=out, steps=4, **settings).train(on_event=kill)


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(model, tmp_path):
    whole = trainer(model, steps=4).train()
    ended_early(model, tmp_path)
    said = []
    again = trainer(model, out=tmp_path, steps=4).train(on_event=lambda e: said.append(str(e)), resume=True)
    assert sum("has no checkpoint" in text and "begins anew" in text for text in said) == 1
    assert all(torch.equal(whole.tensors[n], again.tensors[n]) for n in whole.tensors)


@pytest.mark.slow
def test_it_is_the_same_run_or_refused(model, tmp_path):
    """As a checkpoint is: by its settings, where some are asked for, and its pictures."""
    ended_early(model, tmp_path, learning_rate=0.01)
    with pytest.raises(ValueError, match=r"begun\.json was made with other settings: learning_rate was 0\.01"):
        trainer(model, out=tmp_path, steps=4, learning_rate=0.05).train(resume=True)
    other = Trainer(
        model, "personalized_residuals", pictures(seed=52), class_word="mug", out=tmp_path, **SMALL, steps=4
    )
    with pytest.raises(ValueError, match="other pictures"):
        other.train(resume=True)
    same = trainer(model, out=tmp_path, steps=4)
    assert same.train(resume=True).meta["learning_rate"] == "0.01"  # nobody asked for another


def test_what_cannot_be_resumed_is_one_sentence(model, tmp_path):
    with pytest.raises(ValueError, match="nothing to resume: no out folder"):
        trainer(model, steps=4).train(resume=True)
    (tmp_path / "concept.safetensors").write_bytes(b"a finished run")
    with pytest.raises(ValueError, match=r"nothing to resume: .* has a concept and no whole checkpoint"):
        trainer(model, out=tmp_path, steps=4).train(resume=True)
    assert (tmp_path / "concept.safetensors").read_bytes() == b"a finished run"


@pytest.mark.slow
def test_the_command_begins_anew_where_the_folder_is_there_alone(tmp_path, capsys):
    flags = f"train {PHOTOS} --class mug --steps 1 --batch 1 --no-report --set check_backend=false --out".split()
    assert cli.main([*flags, str(tmp_path / "none"), "--resume"]) == 2
    assert "does not exist, so there is nothing to resume" in capsys.readouterr().err
    assert cli.main([*flags, str(tmp_path), "--resume"]) == 0
    assert "has no checkpoint: its run ended before the first one and begins anew" in capsys.readouterr().err
    assert (tmp_path / "concept.safetensors").is_file()


@pytest.mark.slow
def test_a_training_in_python_takes_no_signal(model):
    taken = []

    def look(_event):
        taken.append([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)])

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    trainer(model, steps=2).train(on_event=look)
    assert len(taken) > 2 and all(found == before for found in taken)


def full(*_args, **_kwargs):
    raise OSError(28, "out/concept.safetensors could not be written (No space left on device)")


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_loses_nothing(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(NotSaved) as error:
        patched.setattr(Concept, "save", full)
        trainer(model, out=tmp_path, steps=3).train()
    assert "No space left on device" in str(error.value) and "\n" not in str(error.value)
    assert "checkpoint-3 holds all 3 steps: --resume, train(resume=True), writes the concept then" in str(error.value)
    assert cli.sentence(error.value) == str(error.value)
    resumed = trainer(model, out=tmp_path, steps=3).train(resume=True)
    kept = load_concept(tmp_path / "concept.safetensors", model)
    for name, tensor in error.value.concept.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name]) and torch.equal(tensor, kept.tensors[name])


@pytest.mark.slow
def test_a_new_run_in_the_folder_of_an_unfinished_one_keeps_its_own_checkpoints(model, tmp_path):
    """Their numbers may be lower than the earlier run's, which go with the first of its own."""
    ended_early(model, tmp_path, checkpoint_every=1, keep=2)
    (tmp_path / "checkpoint-1").rename(tmp_path / "checkpoint-100")
    shutil.copytree(tmp_path / "checkpoint-100", tmp_path / "checkpoint-200")
    said: list[str] = []
    with pytest.raises(Killed):

        def kill(event):
            said.append(str(event))
            if event.kind == "step" and event.step == 2:
                raise Killed

        trainer(model, out=tmp_path, steps=4, checkpoint_every=1, keep=2, learning_rate=0.02).train(on_event=kill)
    assert sum("checkpoints of an earlier run" in text for text in said) == 1
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    trainer(model, out=tmp_path, steps=4, learning_rate=0.02).train(resume=True)


@pytest.mark.slow
def test_a_new_run_in_the_folder_of_an_unfinished_one_that_ended_early_begins_anew(model, tmp_path):
    """It does not go on from the earlier run's checkpoint."""
    ended_early(model, tmp_path, checkpoint_every=1)
    ended_early(model, tmp_path, seed=5)
    said: list[str] = []
    concept = trainer(model, out=tmp_path, steps=4, checkpoint_every=2, seed=5).train(
        on_event=lambda e: said.append(str(e)), resume=True
    )
    assert any("has no checkpoint of its last run" in text for text in said)
    assert concept.meta["seed"] == "5" and concept.meta["steps"] == "4"
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.slow
def test_the_command_refuses_the_folder_of_an_unfinished_run(model, tmp_path, capsys):
    ended_early(model, tmp_path, checkpoint_every=1)
    assert cli.main(["train", str(PHOTOS), "--class", "mug", "--out", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "a run that is not finished" in shown and "--resume" in shown and "--overwrite" in shown


@pytest.mark.slow
def test_a_run_over_a_finished_one_that_ended_early_begins_anew(model, tmp_path):
    trainer(model, out=tmp_path, steps=2).train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="nothing to resume"):
        trainer(model, out=tmp_path, steps=4).train(resume=True)
    ended_early(model, tmp_path, seed=5)
    concept = trainer(model, out=tmp_path, steps=4, seed=5).train(resume=True)
    assert concept.meta["seed"] == "5" and concept.meta["steps"] == "4"


def test_a_beginning_that_cannot_be_read_says_nothing(tmp_path):
    for text in ('{"a": 1}', '{"base": 1, "base_name": 2, "data": 3, "settings": 4}', "[]", "{"):
        (tmp_path / BEGUN).write_text(text)
        assert begun_with(tmp_path) == {}
