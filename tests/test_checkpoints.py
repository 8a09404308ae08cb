"""A run's folder holds whole checkpoints alone, wherever a run is killed, and none of another run goes on."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pcs_trainer import load_model, run_folder
from pcs_trainer.cli.commands.train import check
from pcs_trainer.errors import UsageError
from pcs_trainer.files import written_text
from pcs_trainer.methods import method_named, settings_for
from pcs_trainer.model.fingerprint import fingerprint
from pcs_trainer.run_folder import BEGUN, FILES, checkpoints, run_checkpoints
from pcs_trainer.training.checkpoint import begins_anew, begun_with, check_same_run, read_checkpoint, write_checkpoint


class Killed(BaseException):
    """Ends a process in the middle of it."""


def write(out: Path, step: int, run: str = "", keep: int = 2) -> Path:
    state = {"base": "b:1", "base_name": "b", "data": "d", "settings": {}, "run": run, "step": step, "optimizer": {}}
    return write_checkpoint(out, step, {"word.0": torch.full((2,), float(step))}, state, keep)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize("removed", range(4))
def test_killed_while_an_old_checkpoint_is_removed(tmp_path, monkeypatch, removed):
    """After each number of its files: what has a checkpoint's name is whole, and the next write removes the rest."""
    write(tmp_path, 1)

    def some(folder, **_):
        for file in sorted(Path(folder).iterdir())[:removed]:
            file.unlink()
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(run_folder.shutil, "rmtree", some)
        write(tmp_path, 2, keep=1)
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(names(tmp_path)) == 2
    assert read_checkpoint(checkpoints(tmp_path)[-1])[1]["step"] == 2
    write(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("missing", FILES)
def test_a_checkpoint_with_a_file_missing_counts_for_nothing_and_goes(tmp_path, missing):
    """Version 0.1.0 removed them where they stood."""
    write(tmp_path, 1)
    (write(tmp_path, 9) / missing).unlink()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-1"]
    other = tmp_path / "checkpoint-500"  # another trainer's
    other.mkdir()
    (other / "optimizer.pt").write_bytes(b"its own")
    (other / "unet.safetensors").write_bytes(b"its own")
    write(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-500"]
    assert len(names(other)) == 2


@pytest.mark.skipif(os.name == "nt", reason="there nobody can tell whether a process runs")
def test_what_dead_processes_left_goes_and_what_living_ones_write_stays(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    living = os.getppid()
    for process in (ended.pid, living):
        for name in (f".checkpoint-3.{process}.part", f".checkpoint-1.{process}.old"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "state.json").write_text("{}")
        (tmp_path / f".concept.safetensors.{process}.part").write_bytes(b"half")
    (tmp_path / f".notes.{ended.pid}.old").write_text("the user's")
    write(tmp_path, 4)
    expected = [f".checkpoint-1.{living}.old", f".checkpoint-3.{living}.part", f".concept.safetensors.{living}.part"]
    assert names(tmp_path) == sorted([*expected, f".notes.{ended.pid}.old", "checkpoint-4"])


def test_a_run_goes_on_from_its_own_checkpoints(tmp_path):
    """And not from an earlier one's, whose numbers may be higher, however far its removal got."""
    for step in (100, 200):
        write(tmp_path, step, "first")
    written_text(tmp_path / BEGUN, '{"base": "b:1", "base_name": "b", "data": "d", "settings": {}, "run": "second"}')
    assert begins_anew(tmp_path) and begun_with(tmp_path)["run"] == "second"
    assert len(checkpoints(tmp_path)) == 2 and not run_checkpoints(tmp_path)
    shutil.copytree(tmp_path / "checkpoint-200", tmp_path / "kept")
    write(tmp_path, 1, "second")
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-1"]
    (tmp_path / "kept").rename(tmp_path / "checkpoint-200")  # as if it had been killed before it removed this one
    assert [folder.name for folder in run_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert not begins_anew(tmp_path) and begun_with(tmp_path)["run"] == "second"
    write(tmp_path, 2, "second")
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert not run_checkpoints(tmp_path / "none")


def test_checkpoints_of_older_versions_go_on(tmp_path):
    """They say no run, and neither does their beginning."""
    write(tmp_path, 1)
    assert not begins_anew(tmp_path)
    written_text(tmp_path / BEGUN, '{"base": "b:1", "base_name": "b", "data": "d", "settings": {}}')
    assert not begins_anew(tmp_path) and begun_with(tmp_path)["step"] == 1


def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(tmp_path):
    written_text(tmp_path / BEGUN, '{"base": "b:1", "base_name": "b", "data": "d", "settings": {}, "run": "a"}')
    file = write(tmp_path, 1, "a") / "state.json"
    file.write_text(file.read_text()[:20])
    assert not begins_anew(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-1 cannot be read .*; remove it"):
        read_checkpoint(run_checkpoints(tmp_path)[-1])


def test_a_run_does_not_go_on_with_other_weights(model, tmp_path):
    """A fine-tune has its base model's configuration; another precision is the same model."""
    settings = json.loads(json.dumps(settings_for(None, "textual_inversion").asdict()))
    kind = method_named("textual_inversion").settings
    now = {"base": fingerprint(model), "base_name": "the model", "data": "d", "settings": settings}
    config, _, values = now["base"].partition(":")
    half = fingerprint(load_model("tiny", torch.bfloat16))
    assert half != now["base"]
    for base in (now["base"], half, config):  # a checkpoint that holds no weights is as it was
        check_same_run(tmp_path, now | {"base": base}, now, kind)
    first, *others = values.split(",")
    for base in (",".join([f"{1.05 * float(first):.6g}", *others]), ",".join(str(1.5 * float(v)) for v in others)):
        was = now | {"base": f"{config}:{base}", "base_name": "a fine-tune"}
        with pytest.raises(ValueError, match=r"with other weights \(a fine-tune, now the model\); give the run's own"):
            check_same_run(tmp_path, was, now, kind)


def test_the_command_refuses_an_unfinished_run_before_torch_is_loaded(tmp_path):
    """By the same test of a whole checkpoint: a half one is no run."""
    write(tmp_path, 1)
    code = (
        f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
        "from pcs_trainer.cli.entry import main\n"
        f"code = main(['train', '.', '--class', 'mug', '--out', {str(tmp_path)!r}])\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "holds a run that is not finished" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_takes_a_half_checkpoint_for_none(tmp_path):
    options = argparse.Namespace(photos=["."], class_word="mug", out=str(tmp_path), resume=False, overwrite=False)
    for name in ("budget", "plan", "prior_folder", "with_subjects", "model_config", "prompt"):
        setattr(options, name, None)
    folder = write(tmp_path, 1)
    with pytest.raises(UsageError, match="holds a run that is not finished"):
        check(options)
    (folder / "optimizer.pt").unlink()
    assert check(options) == tmp_path
