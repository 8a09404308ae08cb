"""A full disk is said before work is done for it, and what is done is not called a failure; others' files stay."""

from __future__ import annotations

import errno
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from pcs_trainer import files
from pcs_trainer.cli import config
from pcs_trainer.cli import entry as cli
from pcs_trainer.errors import NotSaved
from pcs_trainer.files import free_bytes, written
from pcs_trainer.model.model import load_model
from pcs_trainer.training.checkpoint import write_checkpoint
from trainer_cases import cache, trainer

__all__ = ["cache"]
Usage = namedtuple("Usage", "total used free")


def left(monkeypatch, size: int) -> None:
    """The disk has so many bytes left."""
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - size, size))


def test_another_programs_checkpoint_of_that_number_stays(tmp_path):
    theirs = {"checkpoint-500": ["model.safetensors", "optimizer.bin"], "checkpoint-400": ["optimizer.pt"]}
    for folder, names in (theirs | {"checkpoint-300": []}).items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text("theirs")
    with pytest.raises(OSError, match="another program's files are there; move them away"):
        write_checkpoint(tmp_path, 500, {"a": torch.zeros(2)}, {"run": "r", "step": 500, "optimizer": {}}, 2)
    write_checkpoint(tmp_path, 7, {"a": torch.zeros(2)}, {"run": "r", "step": 7, "optimizer": {}}, 2)
    for folder, names in theirs.items():
        assert sorted(f.name for f in (tmp_path / folder).iterdir()) == names
    assert (tmp_path / "checkpoint-300").is_dir() and (tmp_path / "checkpoint-7" / "state.json").is_file()


def test_the_room_of_a_folder_that_is_not_there_is_its_parents(tmp_path):
    assert (
        free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.01) and free_bytes(tmp_path) > 0
    )


@pytest.mark.parametrize("command", ["sample", "upscale"])
def test_images_that_the_disk_does_not_hold_are_not_drawn(tmp_path, monkeypatch, capsys, command):
    from PIL import Image
    from upscaler_cases import write_upscaler

    left(monkeypatch, 10_000)
    Image.new("RGB", (64, 64), (200, 30, 40)).save(tmp_path / "photo.png")
    words = ["sample", "a mug"] if command == "sample" else ["upscale", str(tmp_path / "photo.png")]
    if command == "upscale":
        words += ["--model", str(write_upscaler(tmp_path / "x4")), "--dtype", "float32", "--prompt", "a mug"]
    monkeypatch.setattr(f"pcs_trainer.cli.commands.{command}.{command}_batch", lambda *_: pytest.fail("drawn"))
    assert cli.main([*words, "--steps", "1", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "--out: the disk of" in said and "free some space or give another folder" in said


def test_a_configuration_that_cannot_be_written_fails_nothing(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(config, "written_text", full)
    assert cli.main(["sample", "a mug", "--steps", "1", "--quiet", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert Path(told.out.strip()).is_file() and "run.toml could not be written" in told.err


def test_a_file_that_does_not_fit_is_named(tmp_path):
    def write(part):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as error:
        written(tmp_path / "mug.png", write)
    assert error.value.filename == str(tmp_path / "mug.png")
    said = cli.sentence(error.value)
    assert (
        said == f"{tmp_path / 'mug.png'} could not be written: the disk is full; free some space or give another --out"
    )


@pytest.mark.slow
def test_a_training_whose_result_does_not_fit_does_not_begin(tmp_path, monkeypatch):
    model = load_model("tiny")
    left(monkeypatch, 1000)
    with pytest.raises(OSError, match=r"what is learned takes .* free some space"):
        trainer(model, out=tmp_path / "a", steps=1, probe_every=0).train()
    size = 4 * sum(p.numel() for p in trainer(model, steps=1).objective().learner.parameters.values())
    left(monkeypatch, size + size // 2)
    model, told = load_model("tiny"), []
    trainer(model, out=tmp_path / "b", steps=1, probe_every=0).train(told.append)
    assert any("no checkpoint does" in e.data.get("text", "") for e in told if e.kind == "warning")


@pytest.mark.slow
def test_where_nothing_could_be_kept_it_is_said(tmp_path, monkeypatch):
    from pcs_trainer.concept.concept import Concept
    from pcs_trainer.training import run as running

    def full(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(Concept, "save", full)
    monkeypatch.setattr(running, "write_checkpoint", full)
    with pytest.raises(NotSaved, match="nothing of it is on the disk"):
        trainer(load_model("tiny"), out=tmp_path, steps=1, probe_every=0).train()
