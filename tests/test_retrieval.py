"""Class images out of a folder: the nearest to a prompt, by the judge and by CLIP, and what is said of bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_cases import write_clip
from pcs_trainer.cli import entry as cli
from pcs_trainer.data.pictures import load_pictures
from pcs_trainer.data.prior import prior_pictures
from pcs_trainer.evaluation import retrieval
from pcs_trainer.evaluation.image_encoders import ClipDinoEncoder, ClipEncoder
from pcs_trainer.evaluation.retrieval import retrieve
from pcs_trainer.methods import settings_for
from pcs_trainer.tiny.subjects import photos
from PIL import Image

KINDS = ("mug", "fish", "rocket")


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Four pictures of each kind in a folder of its own, under the same names; the mugs have captions."""
    root = tmp_path_factory.mktemp("collection")
    for k, kind in enumerate(KINDS):
        (root / kind).mkdir()
        for i, shot in enumerate(photos(301 + k, 4, kind=kind)):
            Image.fromarray(shot.picture).resize((128, 128)).save(root / kind / f"{i}.png")
            if kind == "mug":
                (root / kind / f"{i}.txt").write_text(f"{shot.caption}\n")
    return root


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def settings(folder):
    return settings_for(None, "custom_diffusion", resolution=64, augment=False, prior_folder=str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_finds_the_pictures_of_a_class(collection, tmp_path, kind):
    found = retrieve(collection, f"a photo of a {kind}", tmp_path / "list", count=3, judge=True)
    assert {picture.path.parent.name for picture in found.pictures} == {kind}
    assert (found.compared, found.skipped) == (12, [])
    similarities = [picture.similarity for picture in found.pictures]
    assert similarities == sorted(similarities, reverse=True)


@pytest.mark.parametrize("copy", [False, True])
def test_the_list_is_what_training_reads(collection, tmp_path, copy):
    """Two pictures of one name have their own captions: the file beside each, and the prompt where there is none."""
    out = tmp_path / "list"
    found = retrieve(
        [collection / "fish", collection / "mug"], " photo of\n a mug ", out, count=8, judge=True, copy=copy
    )
    lines = (out / "images.txt").read_text().splitlines()
    assert lines == [f"images/{i:05d}.png" if copy else str(p.path) for i, p in enumerate(found.pictures)]
    taken = prior_pictures(None, "a mug", settings(out), print)
    for picture, own in zip(taken, found.pictures, strict=True):
        (expected,) = load_pictures([own.path]).pictures
        assert np.array_equal(picture.pixels, expected.pixels)
        assert picture.caption == own.caption == (expected.caption or "photo of a mug")
    assert [p.name for p in tmp_path.iterdir()] == ["list"], "nothing is left beside it"


def test_clip_compares_as_it_does_elsewhere(collection, clip, tmp_path, monkeypatch):
    """Batches do not matter, nor that each picture is reduced when it is read."""
    monkeypatch.setattr(retrieval, "BATCH", 5)
    counted = []
    found = retrieve(
        collection, "a red mug", tmp_path / "x", count=12, clip=clip, progress=lambda *at: counted.append(at)
    )
    assert counted == [(i, 12) for i in range(1, 13)]
    whole = ClipDinoEncoder(clip=clip)
    rows = whole.image([load_pictures([p.path]).pictures[0].pixels for p in found.pictures])
    expected = (rows @ whole.text(["a red mug"])[0]).tolist()
    assert [p.similarity for p in found.pictures] == pytest.approx(expected, abs=1e-5)
    assert torch.equal(ClipEncoder(clip).text(["a red mug"]), whole.text(["a red mug"]))


def test_one_picture_at_a_time_is_held_whole(collection, tmp_path, monkeypatch):
    """What waits for the encoder is its input, 64 x 64."""
    held = []
    whole = retrieval.JudgeEncoder.of_pixels
    monkeypatch.setattr(
        retrieval.JudgeEncoder, "of_pixels", lambda self, pixels: held.append(pixels.shape) or whole(self, pixels)
    )
    retrieve(collection, "a mug", tmp_path / "x", count=1, judge=True)
    assert held == [(12, 3, 64, 64)]


def test_what_training_would_not_use_is_left_out_and_named(collection, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    (folder / ".thumbnails").mkdir()
    for name in ("a.png", "deep/a copy.png", ".thumbnails/a.png", "a-mask.png"):
        (folder / name).write_bytes((collection / "mug" / "0.png").read_bytes())
    (folder / "b.png").write_bytes((collection / "mug" / "1.png").read_bytes())
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "two\nlines.png").write_bytes((collection / "mug" / "2.png").read_bytes())
    Image.new("RGB", (64, 64)).save(folder / "black.png")
    found = retrieve(folder, "a mug", tmp_path / "list", count=5, judge=True)
    assert {p.path.name for p in found.pictures} == {"a.png", "b.png"}
    said = "; ".join(found.skipped)
    for words in (
        "black.png is blank",
        "broken.jpg cannot be decoded",
        "a copy.png is the same picture as",
        "one a line",
    ):
        assert words in said
    assert len(found.skipped) == 4


def wrong_request(collection, clip, tmp_path):
    """(arguments, what the sentence says), where no picture needs to be looked for"""
    out = tmp_path / "out"
    yield (tmp_path / "nowhere", "a mug", out), dict(judge=True), "nowhere does not exist"
    yield (collection, "  ", out), dict(judge=True), r"the class prompt \(--prompt\) is blank"
    yield (collection, "a " * 20_000, out), dict(judge=True), r"the class prompt \(--prompt\) has 40,000 characters"
    yield (collection, "a mug", out), {}, "name a CLIP model on this machine"
    yield (collection, "a mug", out), dict(clip=clip, judge=True), "one of the two"
    yield (collection, "a mug", out), dict(clip="nowhere/clip"), r"clip='nowhere/clip' \(--clip\) does not exist"
    yield (collection, "a mug", collection), dict(judge=True), r"\(--out\) is there already; name a new folder"


def wrong(collection, clip, tmp_path):
    """(arguments, what the sentence says)"""
    yield from wrong_request(collection, clip, tmp_path)
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    black = tmp_path / "black"
    black.mkdir()
    Image.new("RGB", (64, 64)).save(black / "0.png")
    yield (empty, "a mug", out), dict(judge=True), "holds no pictures; looked for .png"
    yield (black, "a mug", out), dict(judge=True, count=1), "no picture that can be used: .*black/0.png is blank"
    yield (
        (collection, "a mug", out),
        dict(judge=True),
        "12 pictures, fewer than the 200 asked for. Fix: --count 12",
    )
    yield (collection, "a mug", out), dict(judge=True, count=0), "count must be at least 1"
    yield (
        (collection, "a mug", out),
        dict(clip=empty, count=2),
        "no CLIP model in .*empty.* such as openai/clip-vit-base-patch32",
    )


def test_the_command_says_what_the_function_says_without_loading_torch(collection, clip, tmp_path):
    """The arguments are checked in one place."""
    lines, says = [], []
    for (pictures, prompt, out), options, sentence in wrong_request(collection, clip, tmp_path):
        flags = ["--judge"] if options.get("judge") else []
        flags += ["--clip", str(options["clip"])] if "clip" in options else []
        lines.append(["retrieve", str(pictures), "--prompt", prompt, "--out", str(out), *flags])
        says.append(sentence)
    code = "import json, sys; from pcs_trainer.cli.entry import main; codes = [main(x) for x in json.load(sys.stdin)]; "
    code += "print(codes, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(lines), capture_output=True, text=True)
    assert done.stdout == f"{[2] * len(lines)} False\n", done.stderr
    for line, sentence in zip(done.stderr.splitlines(), says, strict=True):
        assert re.search(sentence, line)


def test_bad_input_is_one_sentence_and_leaves_nothing(collection, clip, tmp_path):
    for arguments, options, says in wrong(collection, clip, tmp_path):
        with pytest.raises(ValueError, match=says) as error:
            retrieve(*arguments, **options)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_list_that_cannot_be_written_leaves_nothing(collection, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(retrieval.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        retrieve(collection, "a mug", tmp_path / "list", count=2, judge=True, copy=True)
    assert not list(tmp_path.iterdir())


def test_from_the_command_line(collection, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["retrieve", str(collection), "--prompt", "a photo of a fish", "--count", "3", "--out", "my list"]
    assert cli.main([*line, "--judge"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "my list\n" and "3 of 12 pictures" in shown.err and "--prior-folder 'my list'" in shown.err
    assert {p.name for p in Path("my list").iterdir()} == {"images.txt", "caption.txt", "run.toml"}
    assert cli.main([*line, "--judge"]) == 2
    assert "name a new folder" in capsys.readouterr().err
    line[-1] = "by-clip"
    assert cli.main([*line, "--clip", str(clip), "--copy", "--quiet"]) == 0
    assert len(list(Path("by-clip/images").iterdir())) == 3 and capsys.readouterr().err == ""
    line[line.index("3")] = "30"
    line[-1] = "more"
    assert cli.main([*line, "--judge"]) == 1
    assert "holds 12 pictures, fewer than the 30 asked for" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named_before_anything_is_compared(collection, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    found = retrieve(collection, "a photo of a mug", tmp_path / "link", count=2, judge=True)
    assert (tmp_path / "real" / "images.txt").is_file() and found.folder == tmp_path / "real"
    monkeypatch.setattr(retrieval, "_compared", lambda *given: pytest.fail("compared"))
    with pytest.raises(ValueError, match="/proc/x cannot be written"):
        retrieve(collection, "a photo of a mug", "/proc/x", count=2, judge=True)
    with pytest.raises(ValueError, match="characters"):
        retrieve(collection, "a " * 20_000, tmp_path / "new", count=2, judge=True)
