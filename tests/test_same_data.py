"""What is kept is found again by the weights that made it, and a run goes on from the pictures that it began with."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from pcs_trainer import Trainer, load_model
from pcs_trainer.data.identity import older_digest
from pcs_trainer.data.latents import cached_moments
from pcs_trainer.data.prior import prior_pictures
from pcs_trainer.methods import settings_for
from pcs_trainer.run_folder import checkpoints
from pcs_trainer.training import task
from PIL import Image
from trainer_cases import SMALL, cache, pictures, trainer

__all__ = ["cache"]


@contextmanager
def halved(p: torch.nn.Parameter):
    """One tensor of a network at half of its values."""
    p.data.mul_(0.5)
    try:
        yield
    finally:
        p.data.mul_(2.0)


def test_another_autoencoder_has_latents_of_its_own(model):
    first = cached_moments(model, pictures()).mean
    with halved(model.vae.encoder.conv_out.weight):
        other = cached_moments(model, pictures()).mean
    assert not torch.equal(first, other)
    assert torch.equal(cached_moments(model, pictures()).mean, first)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["text", "vae"])
def test_another_text_encoder_or_autoencoder_draws_class_images_of_its_own(part, tmp_path, monkeypatch):
    monkeypatch.setenv("PCS_CACHE", str(tmp_path))
    model, told = load_model("tiny"), []
    s = settings_for(model, "dreambooth_lora", prior_images=1, prior_steps=2, resolution=64)
    norms = [p for n, p in model.text_encoder.named_parameters() if n.endswith("final_layer_norm.weight")]
    p = norms[0] if part == "text" else model.vae.decoder.conv_out.weight
    first = prior_pictures(model, "a mug", s, told.append)[0]
    with halved(p):
        other = prior_pictures(model, "a mug", s, told.append)[0]
    again = prior_pictures(model, "a mug", s, told.append)[0]
    assert not np.array_equal(first.pixels, other.pixels) and np.array_equal(first.pixels, again.pixels)
    assert len(told) == 2  # the third is what the first one kept


def shaken(monkeypatch):
    """Class images' latents as another backend computes them: other last bits."""
    honest = task.prior_bank

    def prior_bank(*args):
        bank = honest(*args)
        bank.moments.mean = bank.moments.mean * (1 + 2**-20)
        return bank

    monkeypatch.setattr(task, "prior_bank", prior_bank)


@pytest.mark.slow
def test_latents_that_differ_in_the_last_bits_are_the_same_run(model, tmp_path, monkeypatch):
    trainer(model, "dreambooth_lora", tmp_path, steps=2, prior_weight=1.0).train()
    shaken(monkeypatch)
    concept = trainer(model, "dreambooth_lora", tmp_path, steps=3, prior_weight=1.0).train(resume=True)
    assert concept.meta["steps"] == "3"


def class_images(folder: Path, level: int) -> str:
    folder.mkdir()
    noise = np.random.default_rng(level).integers(0, 255, (64, 64, 3))
    Image.fromarray(noise.astype(np.uint8)).save(folder / "one.png")
    return str(folder)


@pytest.mark.slow
def test_other_class_images_are_another_run(model, tmp_path):
    first, other = class_images(tmp_path / "a", 1), class_images(tmp_path / "b", 2)
    chosen = dict(prior_weight=1.0, prior_folder=first)
    trainer(model, "dreambooth_lora", tmp_path / "out", steps=2, **chosen).train()
    (Path(first) / "one.png").write_bytes((Path(other) / "one.png").read_bytes())
    with pytest.raises(ValueError, match="other pictures"):
        trainer(model, "dreambooth_lora", tmp_path / "out", steps=3, **chosen).train(resume=True)


@pytest.mark.slow
def test_a_checkpoint_of_the_first_version_with_class_images_goes_on(model, tmp_path):
    """It held a hash of the class images' latents."""
    chosen = SMALL | dict(prior_weight=1.0, class_word="mug", out=tmp_path)
    trainer(model, "dreambooth_lora", tmp_path, steps=2, prior_weight=1.0).train()
    t = Trainer(model, "dreambooth_lora", pictures(), steps=3, **chosen)
    data = t.objective().data
    t.learner.restore()
    file = checkpoints(tmp_path)[-1] / "state.json"
    older = older_digest(t.subjects, data.prior)
    assert older != data.digest and data.digest in file.read_text()
    file.write_text(file.read_text().replace(data.digest, older))
    assert Trainer(model, "dreambooth_lora", pictures(), steps=3, **chosen).train(resume=True).meta["steps"] == "3"
