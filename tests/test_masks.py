"""A subject's mask goes with its picture through every change, and an empty one is named before anything trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pcs_trainer.data import augment
from pcs_trainer.data.augment import Shown, training_mask, varied
from pcs_trainer.data.batches import seeded
from pcs_trainer.training.losses import picture_losses
from pcs_trainer.training.task import prepare
from pcs_trainer.training.trainer import Trainer
from PIL import Image
from trainer_cases import cache, trainer

__all__ = ["cache"]

SIZE, LATENT = 64, 16


def red_square(height=SIZE, width=SIZE, top=20, left=8, side=20):
    """A picture whose subject is red, and the mask of it."""
    pixels, mask = np.full((height, width, 3), (60, 60, 60), np.uint8), np.zeros((height, width), np.float32)
    pixels[top : top + side, left : left + side], mask[top : top + side, left : left + side] = (250, 0, 0), 1
    return Shown(pixels, mask)


def is_red(pixels):
    return (pixels[..., 0].astype(int) - pixels[..., 2]) > 120


CHANGES = {
    "custom_diffusion": lambda shown, i: augment.custom_diffusion(shown, SIZE, LATENT, seeded(i)),
    "textboost": lambda shown, i: augment.textboost(shown, SIZE, 0.8, seeded(i)),
}


@pytest.mark.parametrize("shape", [(64, 64), (60, 96)])
@pytest.mark.parametrize("name", CHANGES)
def test_the_mask_is_where_the_subject_is_whatever_was_done(name, shape):
    """In every kind of change; grey pictures have lost the colour that tells the subject."""
    seen, picture = set(), red_square(*shape, left=8 + (shape[1] - shape[0]) // 2)  # drawn-out edges are not of it
    for i in range(150):
        shown = CHANGES[name](picture, i)
        said = shown.prefix.split()
        if augment.word("grayscale") in said:
            continue
        seen |= {shown.prefix} if name == "custom_diffusion" else set(said)
        red, masked = is_red(shown.pixels), shown.subject > 0.5
        assert shown.subject.shape == (SIZE, SIZE)
        wrong = (red != masked).mean()
        assert wrong < 0.01 + 0.35 * red.mean(), (i, shown.prefix)  # an edge of a pixel, and of nine small tiles
        counted = training_mask(shown, LATENT)
        if red.mean() > 0.05 and name == "textboost":
            assert float(counted.mean()) == pytest.approx(float(masked.mean()), abs=0.03)
    every = {"", *augment.FAR, *augment.NEAR} if name == "custom_diffusion" else set(map(augment.word, augment.WORDS))
    assert seen >= every - {augment.word("grayscale")}


def test_a_change_without_a_mask_gives_the_pixels_that_it_gives_with_one():
    picture = red_square()
    for change in CHANGES.values():
        for i in range(40):
            with_mask, without = change(picture, i), change(Shown(picture.pixels), i)
            assert np.array_equal(with_mask.pixels, without.pixels) and with_mask.prefix == without.prefix
            assert without.subject is None


def test_far_away_pictures_count_the_subject_within_the_pasted_box():
    shown = next(
        s for s in (CHANGES["custom_diffusion"](red_square(), i) for i in range(50)) if s.prefix in augment.FAR
    )
    counted = training_mask(shown, LATENT)[0].numpy()
    assert 0 < counted.sum() < shown.mask.sum() and not counted[shown.mask == 0].any()


def test_variations_that_lose_the_subject_are_drawn_again():
    corner = red_square(top=0, left=0, side=8)

    def cropped(shown, size, latent, generator):
        return augment._augmented(augment._cropped(shown.fitted(size), generator)[0], "crop ")

    plain = [cropped(corner, SIZE, LATENT, seeded(i)) for i in range(30)]
    assert any(float(training_mask(s, LATENT).sum()) < 1 for s in plain)
    kept = [varied(corner, SIZE, LATENT, cropped, seeded(i)) for i in range(30)]
    assert all(float(training_mask(s, LATENT).sum()) >= 1 for s in kept) and any(s.prefix for s in kept)
    first = varied(red_square(side=40), SIZE, LATENT, cropped, seeded(3))
    assert np.array_equal(first.pixels, cropped(red_square(side=40), SIZE, LATENT, seeded(3)).pixels)


@pytest.mark.parametrize("method", ["personalized_residuals", "custom_diffusion"])
def test_a_mask_that_is_empty_in_the_middle_is_named_before_anything_is_drawn(model, method):
    """The loss would be 0 / 0, which ended three steps later as "the learning rate may be too high"."""
    t = trainer(model, method, **({"augment": True} if method == "custom_diffusion" else {}))
    wide = red_square(64, 128, left=2, side=20)
    for picture in t.subjects[0].pictures:
        picture.pixels, picture.mask = wide.pixels, wide.mask
    with pytest.raises(
        ValueError, match=r"array: its mask leaves less than one of 16 x 16 latent pixels in the middle"
    ):
        prepare(t.task, lambda kind, **data: None)
    nothing = torch.zeros(1, 1, 4, 4)
    assert not torch.isfinite(picture_losses(torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), nothing)).any()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["textboost", "custom_diffusion"])
def test_every_picture_of_a_bank_has_its_mask(model, tmp_path, method):
    for i in range(2):
        shown = red_square(side=24)
        Image.fromarray(shown.pixels).save(tmp_path / f"{i}.png")
        Image.fromarray((shown.mask * 255).astype(np.uint8)).save(tmp_path / f"{i}-mask.png")
    own = dict(prior_images=2, prior_steps=2) if method == "custom_diffusion" else dict(variant="v1")
    t = Trainer(model, method, tmp_path, class_word="mug", augment=True, bank=24, **own)
    bank = prepare(t.task, lambda kind, **data: None).bank
    assert sum(p.startswith(("<aug", "very", "a far", "zoomed", "close")) for p in bank.prompts) > 8
    shares = bank.masks.flatten(1).mean(1)
    assert len(shares) == 24 and bool((shares > 0).all()) and bool((shares < 0.95).all())
