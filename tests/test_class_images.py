"""Class images of several subjects, listed ones, and what is shown of photos: crops and mirror images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pcs_trainer.cli.commands import command
from pcs_trainer.cli.commands.train import check, together
from pcs_trainer.cli.commands.train_flags import overrides
from pcs_trainer.cli.config import effective
from pcs_trainer.cli.options import parse
from pcs_trainer.data.batches import Subject, prior_bank, subject_bank
from pcs_trainer.data.pictures import Loaded, Picture
from pcs_trainer.data.prior import prior_pictures
from pcs_trainer.data.views import CROPS, views
from pcs_trainer.errors import UsageError
from pcs_trainer.methods import settings_for
from PIL import Image
from trainer_cases import cache, pictures, trainer

__all__ = ["cache"]


def folder_of(path: Path, n: int, level: int) -> Path:
    path.mkdir(parents=True)
    noise = np.random.default_rng(level).integers(0, 40, (n, 64, 64, 3))
    for i in range(n):
        Image.fromarray((noise[i] + level).astype(np.uint8)).save(path / f"{level}-{i}.png")
    return path


def settings(**chosen):
    return settings_for(None, "custom_diffusion", **dict(resolution=64, augment=False) | chosen)


def subject(word, **chosen):
    return Subject(Loaded([Picture(p, "p") for p in pictures()], [], []), settings(class_word=word, **chosen))


def test_each_subject_has_class_images_of_its_own(model, tmp_path):
    mugs, dogs = folder_of(tmp_path / "mugs", 3, 10), folder_of(tmp_path / "dogs", 2, 200)
    both = [subject("mug", prior_folder=str(mugs), flip=False), subject("dog", prior_folder=str(dogs), flip=False)]
    bank = prior_bank(model, both, both[0].settings, 64, print)
    assert bank.prompts == ["photo of a mug"] * 3 + ["photo of a dog"] * 2
    same = [subject(word, prior_folder=str(mugs), flip=False) for word in ("mug", "dog")]
    with pytest.raises(ValueError, match="has no caption, and the subjects are of several classes"):
        prior_bank(model, same, same[0].settings, 64, print)


def test_listed_class_images_have_their_captions(model, tmp_path):
    folder = folder_of(tmp_path / "reg" / "images", 3, 50).parent
    (folder / "images.txt").write_text("images/50-2.png\nimages/50-0.png\n")
    (folder / "caption.txt").write_text("a blue mug\na mug on a shelf\n")
    found = prior_pictures(model, "a mug", settings(prior_folder=str(folder)), print)
    assert [(p.name, p.caption) for p in found] == [("50-2.png", "a blue mug"), ("50-0.png", "a mug on a shelf")]
    (folder / "caption.txt").write_text("a blue mug\n")
    with pytest.raises(ValueError, match=r"caption\.txt has 1 lines and .*images\.txt 2"):
        prior_pictures(model, "a mug", settings(prior_folder=str(folder)), print)


def test_half_of_what_is_trained_on_is_mirrored(model):
    plain, flipped = (subject("mug", flip=flip) for flip in (False, True))
    shown = views(flipped.pictures, flipped.settings, torch.Generator())
    assert len(shown) == 4 and all(np.array_equal(shown[i].pixels[:, ::-1], shown[2 + i].pixels) for i in (0, 1))
    assert views(plain.pictures, plain.settings, torch.Generator()) == plain.pictures
    banks = [subject_bank(model, [one], 64)[0] for one in (plain, flipped)]
    assert [len(b) for b in banks] == [2, 4] and torch.equal(banks[0].moments.mean, banks[1].moments.mean[:2])
    assert settings_for(None, "custom_diffusion").flip and not settings_for(model, "custom_diffusion").flip
    assert not settings_for(None, "dreambooth").flip


def test_a_mirrored_photo_has_its_mask_mirrored():
    mask = np.zeros((64, 64), np.float32)
    mask[10:30, :20] = 1
    pixels = np.repeat((mask * 200).astype(np.uint8)[..., None], 3, axis=2)
    given, mirrored = views([Picture(pixels, "p", mask=mask)], settings(flip=True), torch.Generator())
    assert given.mask is mask and np.array_equal(mirrored.mask, mask[:, ::-1])
    assert np.array_equal(mirrored.pixels[..., 0] > 0, mirrored.mask > 0)


@pytest.mark.slow
def test_a_step_of_custom_diffusion_is_four_photos_and_four_class_images(model):
    """Its authors' 8 on two GPUs of 4, where half of each GPU's pictures hold on to the class."""
    preset = settings_for(None, "custom_diffusion")
    assert preset.batch == 4
    t = trainer(model, "custom_diffusion", batch=preset.batch, prior_images=4)
    batch = t.objective().batch(0, 0)
    t.learner.restore()
    assert batch.subjects == 4 and len(batch.latents) == len(batch.prompts) == 8


def test_random_crops_show_the_whole_photo_and_its_mask():
    columns = np.broadcast_to(np.arange(90, dtype=np.uint8)[None, :, None], (30, 90, 3))
    mask = np.broadcast_to(np.arange(90, dtype=np.float32)[None], (30, 90))
    generator = torch.Generator().manual_seed(0)
    shown = views([Picture(columns, "wide", mask=mask)], settings(crop="random", flip=False), generator)
    assert len(shown) == CROPS and all(p.pixels.shape == (30, 30, 3) for p in shown)
    assert all(np.array_equal(p.pixels[..., 0], p.mask) for p in shown)
    starts = {int(p.pixels[0, 0, 0]) for p in shown}
    assert len(starts) > 4 and min(starts) < 20 and max(starts) > 40
    assert views([Picture(columns, "wide")], settings(flip=False), generator)[0].pixels is columns


def test_the_command_line_gives_each_subject_its_folder(tmp_path):
    for name in ("a", "b", "ra", "rb"):
        (tmp_path / name).mkdir()
    train, at = command("train"), {n: str(tmp_path / n) for n in ("a", "b", "ra", "rb")}
    words = [at["a"], "--class", "mug", "--with", f"{at['b']}=dog", "--out", str(tmp_path / "out")]
    options = effective(train, parse(train, [*words, "--prior-folder", at["ra"], "--prior-folder", at["rb"]]))
    check(options)
    assert "prior_folder" not in overrides(options)
    assert [one["prior_folder"] for one in together(options, at["a"])] == [at["ra"], at["rb"]]
    one = effective(train, parse(train, [*words, "--class_data_dir", at["ra"]]))
    assert overrides(one)["prior_folder"] == at["ra"] and "prior_folder" not in together(one, at["a"])[0]
    three = effective(train, parse(train, words + ["--prior-folder", at["ra"]] * 3))
    with pytest.raises(UsageError, match="3 folders and 2 subjects"):
        check(three)


def test_a_list_of_concepts_may_have_several_class_folders(tmp_path):
    for name in ("a", "b", "ra", "rb"):
        (tmp_path / name).mkdir()
    entries = [
        {
            "instance_data_dir": str(tmp_path / n),
            "instance_prompt": f"photo of a <{n}> {word}",
            "class_data_dir": str(tmp_path / f"r{n}"),
        }
        for n, word in (("a", "mug"), ("b", "dog"))
    ]
    file = tmp_path / "concepts.json"
    file.write_text(json.dumps(entries))
    train = command("train")
    options = effective(train, parse(train, ["--concepts_list", str(file)]))
    assert options.prior_folder == [str(tmp_path / "ra"), str(tmp_path / "rb")]
    del entries[1]["class_data_dir"]
    file.write_text(json.dumps(entries))
    with pytest.raises(UsageError, match="some have none"):
        parse(train, ["--concepts_list", str(file)])
