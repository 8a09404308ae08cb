"""Whatever is in the user's folder: one sentence for each picture that cannot be used, and nothing lost."""

from __future__ import annotations

import os

import numpy as np
import pytest
from pcs_trainer.data.pictures import Picture, fitted, load_pictures, size_notes
from pcs_trainer.tiny.subjects import photos
from pcs_trainer.training.trainer import Trainer
from PIL import Image


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(photos(71, 1)[0].picture).save(tmp_path / "good.png")
    return tmp_path


def test_no_picture(tmp_path):
    with pytest.raises(ValueError, match="holds no picture"):
        load_pictures(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_pictures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no picture"):
        load_pictures([])


def test_bad_ones_among_good_ones_are_named_and_skipped(folder):
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    Image.new("RGB", (3, 3)).save(folder / "small.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:400])
    (folder / "raw.DNG").write_bytes(b"II*")
    found = load_pictures(folder)
    assert [p.name for p in found.pictures] == ["good.png"]
    assert len(found.skipped) == 4
    assert any("raw.DNG is of a kind that is not read" in s for s in found.skipped)
    assert any("broken.jpg" in s and "cannot be decoded" in s for s in found.skipped)
    assert any("small.png" in s and "3 x 3" in s for s in found.skipped)
    assert (folder / "broken.jpg").exists()


def test_unusual_pictures_are_used_and_noted(folder):
    rgb = photos(72, 1)[0].picture
    image = Image.fromarray(rgb)
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    wide = (rgb[..., 0].astype(np.uint16) << 8) + 5
    Image.fromarray(wide).save(folder / "deep.png")
    frames = [image, image.rotate(90)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    see_through = image.convert("RGBA")
    see_through.putalpha(0)
    see_through.save(folder / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.crop((0, 0, 64, 40)).save(folder / "turned.jpg", exif=exif)
    found = load_pictures(folder)
    by_name = {p.name: p.pixels for p in found.pictures}
    assert set(by_name) == {"good.png", "cmyk.jpg", "deep.png", "moving.gif", "clear.png", "turned.jpg"}
    assert not found.skipped and len(found.notes) >= 5
    assert by_name["turned.jpg"].shape == (64, 40, 3)
    assert np.abs(by_name["cmyk.jpg"].astype(int) - rgb).mean() < 12
    assert np.abs(by_name["deep.png"][..., 0].astype(int) - rgb[..., 0]).max() <= 1
    assert (by_name["clear.png"] == 255).all()


def test_pictures_that_teach_less_than_they_seem_to_are_named(folder):
    good = Image.open(folder / "good.png")
    Image.new("RGB", (64, 64), (10, 200, 30)).save(folder / "green.png")
    good.save(folder / "same.png", optimize=True)
    good.resize((250, 64)).save(folder / "wide.png")
    good.save(folder / "pages.tiff", save_all=True, append_images=[good.rotate(90)])
    good.save(folder / "phone.jpg", "MPO", save_all=True, append_images=[good.resize((32, 32))])
    (folder / "phone.txt").write_bytes(b"a mug\xff\xfe on a table")
    good.resize((40, 20)).save(folder / "good-mask.png")
    found = load_pictures(folder)
    assert len(found.pictures) == 6 and not found.skipped
    for said in (
        "green.png is all of one colour",
        "same.png is the same picture as good.png",
        "wide.png is 250 x 64: most of it lies outside",
        "pages.tiff has 2 pages: the first is used",
        "phone.txt is not plain UTF-8 text",
        "the mask good-mask.png is 40 x 20 and good.png 64 x 64: stretched",
    ):
        assert sum(said in note for note in found.notes) == 1, said
    # pages.tiff, the same picture once more, is the seventh note; what a phone writes as MPO is none
    assert len(found.notes) == 7


def test_pixels_that_are_no_numbers_are_named(folder):
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(folder / "nan.tiff")
    assert load_pictures(folder).skipped == [
        "nan.tiff holds NaN or infinity among its pixels; save it as an 8-bit picture"
    ]


def test_a_caption_that_is_a_book_is_refused_before_it_is_read(folder):
    (folder / "good.txt").write_text("mug " * 2_500_000)
    with pytest.raises(ValueError, match=r"good\.txt has 10,000,000 bytes, too many for the caption of good\.png"):
        load_pictures(folder)


def test_a_picture_of_very_many_pixels_is_decoded_smaller_or_refused(folder, monkeypatch):
    """A JPEG can be decoded at a half, a quarter or an eighth; at most 4,096 pixels here stand for 67 million."""
    monkeypatch.setattr("pcs_trainer.data.pictures.LARGEST", 64 * 64)
    good = Image.open(folder / "good.png")
    good.resize((200, 120)).save(folder / "large.jpg", quality=95)
    good.resize((2000, 1200)).save(folder / "larger.jpg")
    good.resize((200, 120)).save(folder / "large.png")
    found = load_pictures(folder)
    assert {p.name: p.pixels.shape for p in found.pictures} == {"good.png": (64, 64, 3), "large.jpg": (30, 50, 3)}
    assert "large.jpg has 200 x 120 pixels: read at 50 x 30" in found.notes
    assert len(found.skipped) == 2
    assert any("large.png has 200 x 120 pixels" in s and "save it smaller" in s for s in found.skipped)
    shrunk = np.asarray(good.resize((50, 30)), int)
    assert np.abs(found.pictures[1].pixels.astype(int) - shrunk).mean() < 8


def test_more_pixels_than_pillow_opens_are_one_sentence(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"good\.png has too many pixels \(Image size \(4096 pixels\)"):
        load_pictures(folder)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # Pillow would warn
    assert len(load_pictures(folder).pictures) == 1


def test_a_picture_that_is_enlarged_much_is_named():
    small, large = (Picture(np.zeros((n, 2 * n, 3), np.uint8), f"{n}.png") for n in (20, 300))
    assert size_notes([small, large], 512) == ["20.png has 40 x 20 pixels: enlarged to 512"]


def test_captions_and_masks(folder):
    (folder / "good.txt").write_text("a red mug\non a table ")
    assert load_pictures(folder).pictures[0].caption == "a red mug on a table"
    (folder / "good.txt").write_text("  \n")
    with pytest.raises(ValueError, match=r"good\.txt is empty"):
        load_pictures(folder)
    (folder / "good.txt").unlink()
    Image.new("L", (64, 64)).save(folder / "good-mask.png")
    with pytest.raises(ValueError, match="all black"):
        load_pictures(folder)
    (folder / "masks").mkdir()
    with pytest.raises(ValueError, match=r"good\.png has no mask"):
        load_pictures(folder, folder / "masks")


def test_fitting_keeps_the_middle():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 200
    assert (fitted(pixels, 40) >= 190).mean() > 0.95


def test_what_the_trainer_is_given(model, folder, tmp_path):
    with pytest.raises(ValueError, match="class_word is missing"):
        Trainer(model, "personalized_residuals", folder)
    with pytest.raises(ValueError, match="images is missing"):
        Trainer(model, "personalized_residuals", class_word="mug")
    with pytest.raises(ValueError, match="already a word"):
        Trainer(model, "personalized_residuals", folder, class_word="mug", token="red")
    with pytest.raises(ValueError, match="steps must be an integer"):
        Trainer(model, "personalized_residuals", folder, class_word="mug", steps=0)
    several = Trainer(model, "textboost", folder, class_word="garden chair", token="<x>", steps=1)
    assert several.trainable()["word.0.<x>"].shape[0] > 1  # a class word of several tokens: a row for each
    several.learner.restore()


@pytest.mark.slow
def test_a_prior_folder_of_black_pictures(model, folder, tmp_path):
    prior = tmp_path / "prior"
    prior.mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64)).save(prior / f"{i}.png")
    t = Trainer(model, "dreambooth_lora", [folder / "good.png"], class_word="mug", prior_folder=str(prior), steps=1)
    with pytest.raises(ValueError, match="is blank"):
        t.train()


@pytest.mark.skipif(os.name == "nt" or not os.path.exists("/dev/full"), reason="POSIX devices")
def test_an_out_folder_that_cannot_be_written(model, folder, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match="cannot be written to"):
        Trainer(model, "personalized_residuals", folder, class_word="mug", out=blocked / "run")


@pytest.mark.slow
def test_a_full_disk_is_a_warning_while_training_and_a_sentence_at_the_end(model, folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    events = []
    t = Trainer(
        model, "personalized_residuals", [folder / "good.png"], class_word="mug", out=tmp_path / "run", steps=2,
        batch=1, check_backend=False, checkpoint_every=1,
    )  # fmt: skip
    monkeypatch.setattr("pcs_trainer.files._stream", full)
    with pytest.raises(OSError, match="No space left on device"):
        t.train(on_event=events.append)
    assert sum("checkpoint" in e.data.get("text", "") for e in events if e.kind == "warning") == 3
    assert not list((tmp_path / "run").rglob("*.part")) and not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_learning_rate_that_diverges(model, folder):
    from pcs_trainer import TrainingStopped

    settings = dict(steps=60, batch=1, check_backend=False, clip_norm=0.0, init="both_random", optimizer="adamw")
    settings |= dict(class_word="mug", weight_decay=0.0)
    t = Trainer(model, "personalized_residuals", [folder / "good.png"], **settings)
    t.settings.learning_rate = 1e18
    with pytest.raises(TrainingStopped, match="learning rate"):
        t.train()
