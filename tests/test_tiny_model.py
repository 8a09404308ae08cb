"""The model that ships: its folder, its tokenizer, its size; it draws what is asked, as diffusers does."""

import json

import numpy as np
import pytest
import torch
from pcs_trainer.tiny import captions, judge, world
from pcs_trainer.tiny.common import WEIGHTS, to_pictures, to_tensor
from pcs_trainer.tiny.make.evaluate import diffusers_difference, psnr
from pcs_trainer.tiny.make.evaluate import test_set as held_out_captions
from pcs_trainer.tiny.make.folder import Parts


@pytest.fixture(scope="module")
def parts():
    return Parts.load(WEIGHTS)


def test_the_folder_is_diffusers_layout_and_small():
    index = json.loads((WEIGHTS / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert all((WEIGHTS / part).is_dir() for part in ("unet", "text_encoder", "tokenizer", "vae", "scheduler"))
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) <= 16_000_000
    assert (WEIGHTS / "README.md").read_text().count("\n") > 20


def test_every_word_of_the_world_is_one_token(parts):
    said = [captions.caption(world.scene(i), np.random.default_rng(i), full=True).text for i in range(200)]
    words = {w for text in said for w in text.replace(",", " ,").split()}
    assert all(len(parts.tokenizer(w).input_ids) == 3 for w in words)
    assert max(len(parts.tokenizer(text).input_ids) for text in said) < parts.tokenizer.model_max_length


def test_unknown_words_fall_into_pieces_and_back(parts):
    ids = parts.tokenizer("a zyrgle mug").input_ids
    assert len(ids) > 5 and parts.tokenizer.decode(ids, skip_special_tokens=True).strip() == "a zyrgle mug"


@pytest.mark.slow
def test_the_autoencoder_keeps_pictures_and_its_latents_are_centred(parts):
    pictures = np.stack([world.render(world.scene(310_000_000 + i)) for i in range(48)])
    with torch.no_grad():
        posterior = parts.vae.encode(to_tensor(pictures)).latent_dist
        again = to_pictures(parts.vae.decode(posterior.mean).sample)
    assert psnr(pictures, again) > 29
    assert posterior.mean.mean((0, 2, 3)).abs().max() < 0.3
    assert parts.vae.config.scaling_factor == 1.0


@pytest.mark.slow
def test_it_draws_what_the_caption_says(parts):
    scenes, texts, names = held_out_captions(16, 60_000_000)
    drawn = parts.draw(texts, seed=1, bf16=True)
    share = judge.agreement(judge.load_judge().read(drawn), scenes, names)
    assert share["kind"] >= 0.8 and share["background"] >= 0.8 and share["colour"] >= 0.7, share


@pytest.mark.slow
def test_the_same_seed_draws_the_same_picture_and_another_another(parts):
    one, again, other = (parts.draw(["a red mug on the beach"], seed=s, steps=4) for s in (3, 3, 4))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


@pytest.mark.slow
def test_diffusers_draws_the_same_picture():
    assert diffusers_difference(WEIGHTS, count=3)["largest"] <= 2
