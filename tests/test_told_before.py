"""What the commands say before work that takes long: many images, many steps, the images of the report."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from pcs_trainer.cli import entry as cli
from pcs_trainer.cli.commands import train as train_command
from pcs_trainer.cli.commands.train import long_note
from pcs_trainer.concept.concept import Concept
from pcs_trainer.report import run_report
from pcs_trainer.training import trainer as training
from trainer_cases import cache, trainer

__all__ = ["cache"]
PHOTOS = Path(__file__).parents[1] / "examples" / "photos"


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (50, ""),  # two prompts: a hundred in all
        (51, "pcs: 102 images of 30 steps each; Ctrl-C ends after the running batch and keeps what is drawn\n"),
        (5000, "pcs: 10,000 images of 30 steps each; Ctrl-C ends after the running batch and keeps what is drawn\n"),
    ],
)
def test_more_than_a_hundred_images_are_said_before_the_first(count, said, monkeypatch, capsys):
    class Begun(Exception):
        pass

    def begin(_options):
        raise Begun

    monkeypatch.setattr("pcs_trainer.cli.commands.sample.open_model", begin)
    with pytest.raises(Begun):
        cli.main(["sample", "a mug", "a dog", "--count", str(count), "--steps", "30", "--debug"])
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 10_000, "batch": 4}, ""),
        (
            {"steps": 9_999_999, "batch": 4},
            "9,999,999 steps see 39,999,996 photos: each of the 2 about 19,999,998 times",
        ),
        ({"steps": 1000, "batch": 50, "accumulate": 4}, "1,000 steps see 200,000 photos: each of the 2 about 100,000"),
        ({"steps": 10_001}, "10,001 steps see 10,001 photos"),
    ],
)
def test_what_very_many_steps_amount_to(model, settings, said):
    note = long_note(trainer(model, **settings))
    assert note.startswith(said) and bool(note) == bool(said) and "\n" not in note


@pytest.fixture
def stub(monkeypatch, model):
    """pcs train without the training and the drawing: what it says around them."""
    calls = []

    class Trained:
        def __init__(self, _model, method, _images, **chosen):
            self.settings = SimpleNamespace(steps=chosen["steps"], batch=4, accumulate=1, packing="both")
            self.subjects = [SimpleNamespace(pictures=[0] * 4)]

        def train(self, *_):
            calls.append("train")
            return Concept("personalized_residuals", {}, {}, {"finished": "1"})

    def report(folder, *_):
        calls.append("report")
        return folder / "report.html"

    monkeypatch.setattr(training, "Trainer", Trained)
    monkeypatch.setattr(run_report, "write_run_report", report)
    monkeypatch.setattr(train_command, "open_model", lambda _options: model)
    monkeypatch.setattr(train_command, "say", lambda text: calls.append(text))
    return calls


@pytest.mark.parametrize("without", [False, True])
def test_the_report_s_images_are_said_before_they_are_drawn(stub, tmp_path, without):
    flags = ["--no-report"] if without else []
    assert cli.main(["train", str(PHOTOS), "--class", "mug", "--steps", "3", "--out", str(tmp_path / "x"), *flags]) == 0
    sentence = "drawing images for the report; --no-report leaves it out, and the concept is saved already"
    assert stub[0] == "train" and stub[1:3] == [sentence, "report"] if not without else sentence not in stub
    assert ("report" in stub) is not without


@pytest.mark.parametrize(("steps", "said"), [(9_999_999, 1), (150, 0)])
def test_very_many_steps_are_said_before_the_first(stub, tmp_path, capsys, steps, said):
    line = ["train", str(PHOTOS), "--class", "mug", "--no-report", "--out", str(tmp_path / "x"), "--steps", str(steps)]
    assert cli.main(line) == 0
    assert capsys.readouterr().err.count("steps see 39,999,996 photos") == said
