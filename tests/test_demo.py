"""The demo: every part is made, a failed part is named and the rest goes on, a stop is a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pcs_trainer.cli.demo import DEFAULT_METHODS, report, running
from pcs_trainer.cli.demo.running import example_photos, run_demo
from pcs_trainer.cli.demo.state import PROMPTS, Demo, with_lag
from pcs_trainer.data.pictures import load_pictures
from pcs_trainer.tiny.subjects import photos, subject
from PIL import Image

WITH_LAG = with_lag("personalized_residuals")
EXAMPLES = Path(__file__).parents[1] / "examples" / "photos"


def test_the_example_photos_are_the_subject_that_an_installed_package_draws():
    assert subject(running.EXAMPLE_SUBJECT).kind == "mug"
    drawn = [photo.picture for photo in photos(running.EXAMPLE_SUBJECT, 4)]
    files = [picture.pixels for picture in load_pictures(EXAMPLES).pictures]
    assert len(files) == 4 and all(np.array_equal(a, b) for a, b in zip(drawn, files, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(example_photos(None), files, strict=True))


@pytest.mark.slow
def test_every_part_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(Demo, "sampling_steps", 3)
    counted = report.memory_of  # five seconds a method: the first one's stands for all
    monkeypatch.setattr(report, "memory_of", lambda demo: counted(replace(demo, columns=demo.columns[:2])))
    done = run_demo(tmp_path / "demo", effort=0.002, quiet=True)
    assert done.failures == []
    names = [column.name for column in done.columns]
    assert len(names) == len(DEFAULT_METHODS) + 2 and WITH_LAG in names
    for column in done.columns:
        assert len(column.pictures) == len(PROMPTS) * done.each
        assert len(column.maps) == done.sampling_steps and all(m.shape == column.maps[0].shape for m in column.maps)
    folder = tmp_path / "demo"
    for file in ("contact_sheet.png", "attention.png", "loss_curves.png"):
        with Image.open(folder / file) as shown:
            assert min(shown.size) > 500
    numbers = json.loads((folder / "numbers.json").read_text())
    assert [row[0] for row in numbers["numbers"]["rows"]] == names
    assert all(-1 <= float(row[5]) <= 1 and 0 <= int(row[6].rstrip("%")) <= 100 for row in numbers["numbers"]["rows"])
    text = done.report.read_text()
    assert (
        all(name in text for name in names) and "gradients agree" in text and "://" not in text.split("<main>")[1][:500]
    )
    plain, lag = (np.stack([np.asarray(p) for c in done.columns if c.name == n for p in c.pictures])
                  for n in ("Personalized Residuals", WITH_LAG))  # fmt: skip
    assert not np.array_equal(plain, lag)


@pytest.mark.slow
def test_a_failed_part_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "memory_of", lambda _: [])
    monkeypatch.setattr(report, "contact_sheet", lambda *_: 1 / 0)
    done = run_demo(tmp_path, effort=0.002, methods=["textboost"], quiet=True)
    assert done.failures == ["Report failed: division by zero"]
    assert "ZeroDivisionError" in (tmp_path / "failures.txt").read_text()
    monkeypatch.setattr(report, "contact_sheet", lambda *_: Image.new("RGB", (8, 8)))
    monkeypatch.setattr("pcs_trainer.training.trainer.Trainer.train", lambda *_: [][0])
    done = run_demo(tmp_path, effort=0.002, methods=["textboost"], quiet=True)
    assert done.failures == ["TextBoost: training failed: list index out of range"]
    assert [column.name for column in done.columns] == ["Base model"]
    assert "TextBoost: training failed" in done.report.read_text()


@pytest.mark.slow
def test_any_method_can_be_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "memory_of", lambda _: [])  # slow, and the first test has it
    done = run_demo(tmp_path, effort=0.002, methods=["textual_inversion"], quiet=True)
    assert done.failures == [] and [c.name for c in done.columns] == ["Base model", "Textual Inversion"]
    assert "One way to learn a mug" in done.report.read_text()


def test_a_stop_before_the_first_part_makes_nothing(tmp_path):
    done = run_demo(tmp_path, should_stop=lambda: True, quiet=True)
    assert done.columns == [] and not (tmp_path / "report.html").exists()
