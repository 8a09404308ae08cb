"""TextBoost against its paper and its code: schedules, what is held, row counts, where crops come from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pcs_trainer.data import augment
from pcs_trainer.data.batches import seeded
from pcs_trainer.methods import method_named, settings_for, textboost
from pcs_trainer.methods.start import learner_for
from pcs_trainer.model.text import encode
from pcs_trainer.training.checkpoint import check_same_run
from test_text_encoder_training import sdxl

__all__ = ["sdxl"]


def test_each_version_has_its_own_schedule():
    steps = {v: settings_for(None, "textboost", variant=v).steps for v in ("v1", "qkv", "causal", "causal++")}
    assert steps == {"v1": 250, "qkv": 250, "causal": 100, "causal++": 80}
    assert settings_for(None, "textboost", variant="causal", steps=7).steps == 7
    assert settings_for(None, "textboost").augment_probability == 0.5


def learned(model, **chosen):
    """A learner with everything that trains moved, and its settings."""
    s = settings_for(model, "textboost", class_word="mug", token="<v>", **chosen)
    learner = learner_for(model, [s])
    with torch.no_grad():
        for p in learner.parameters.values():
            p.add_(torch.randn(p.shape, generator=seeded(3)) * 0.1)
    return learner, s


@pytest.mark.parametrize("variant", ["causal", "causal++"])
def test_preservation_is_left_out_where_it_has_no_gradient(model, variant):
    """General captions do not hold V*: what acts from V* on leaves their states alone, so the loss is 0 for good."""
    learner, s = learned(model, variant=variant, preservation_weight=0.1)
    captions = textboost.preserved_captions(model, [s], 12)
    with torch.no_grad():
        states = encode(model, captions, hold_first=True).states
        frozen = textboost.frozen_states(model, captions)
    learner.restore()
    each = states.values() if isinstance(states, dict) else [states]
    assert all(torch.equal(x, frozen) for x in each)
    assert textboost.preservation(model, [s]) is None and not method_named("textboost").reads_more_text(s)


@pytest.mark.slow
def test_what_is_held_adds_nothing_to_preservation(model):
    """The loss is of the states that the UNet is given: the first token and empty captions are the frozen encoder's."""
    learner, s = learned(model, variant="v1", batch=40, preservation_weight=1.0)
    loss = textboost.preservation(model, [s])
    pick = torch.randint(textboost.CAPTIONS, (s.batch,), generator=seeded(8)).tolist()
    captions = [textboost.preserved_captions(model, [s])[i] for i in pick]
    with torch.no_grad():
        found = float(loss.loss(loss.draw(seeded(8))))
        frozen, tuned = textboost.frozen_states(model, captions), encode(model, captions).states
    learner.restore()
    error = 1 - torch.nn.functional.cosine_similarity(tuned, frozen, dim=-1)  # [B, T], nothing held
    counts = torch.tensor([bool(c) for c in captions])
    assert 0 < int((~counts).sum()) < len(captions)
    expected = float(error[counts, 1:].sum() / error.numel())
    assert found == pytest.approx(expected, rel=1e-4) and found < float(error.mean()) - 1e-4


def test_every_subjects_class_is_preserved(model):
    subjects = [settings_for(model, "textboost", class_word=w) for w in ("mug", "dog", "mug")]
    captions = textboost.preserved_captions(model, subjects, 200)
    assert captions.count("a photo of a mug") == captions.count("a photo of a dog") == 10


def test_the_pooled_text_of_the_empty_prompt_is_held(sdxl):
    s = settings_for(None, "textboost", class_word="b", token="<v>", init_word="b", variant="v1", augment=False)
    with torch.no_grad():
        frozen = encode(sdxl, ["", "b"]).pooled
    learner = learner_for(sdxl, [s])
    with torch.no_grad():
        for p in learner.parameters.values():
            p.add_(torch.randn(p.shape, generator=seeded(3)) * 0.5)
        held, free = (encode(sdxl, ["", "b"], learner.rows, hold_first=hold).pooled for hold in (True, False))
    learner.restore()
    torch.testing.assert_close(held[0], frozen[0])
    assert not torch.allclose(free[0], frozen[0], atol=1e-4) and torch.equal(held[1], free[1])


def test_grayscale_has_two_rows_and_flip_one(model):
    learner, _ = learned(model, variant="v1", augment=True)
    rows = {name: len(learner.words[augment.word(name)].rows[0]) for name in augment.WORDS}
    learner.restore()
    assert rows["grayscale"] == 2 and rows["flip"] == 1 and sum(rows.values()) == 12


def test_a_crop_shows_the_photos_own_pixels():
    """Fine stripes are grey once the photo is reduced to the size; a crop from the photo itself still has them."""
    photo = np.zeros((224, 224, 3), np.uint8)
    photo[:, (np.arange(224) // 2) % 2 == 0] = 255  # a period of four pixels: of 1.1 at 64
    crop = f"{augment.word('crop')} "
    tried = [augment.textboost(augment.Shown(photo), 64, 0.6, seeded(5, i)) for i in range(120)]
    contrast = [float(t.pixels.astype(float).std()) for t in tried if t.prefix == crop]
    assert all(t.pixels.shape == (64, 64, 3) for t in tried) and len(contrast) > 4
    reduced = float(augment.resized(photo, 64).astype(float).std())
    assert max(contrast) > 60 > 10 * reduced


def test_its_prompts_are_many_and_name_the_word_alone():
    """As its code's experiments; the word starts from the class, or from a row for each piece of more."""
    found = settings_for(None, "textboost", class_word="dog", token="<v>").template
    assert len(found) > 20 and all("{token}" in text and "{subject}" not in text for text in found)


def test_the_word_starts_from_the_class_or_from_more_pieces(model):
    for init, text in ((None, "mug"), ("red mug", "red mug")):
        chosen = {} if init is None else {"init_word": init}
        s = settings_for(
            model, "textboost", class_word="mug", token="<v>", template="{token}", variant="v1", augment=False, **chosen
        )
        learner = learner_for(model, [s])
        (rows,) = learner.words["<v>"].rows
        assert torch.equal(rows, learner.vocabulary.rows(text)[0]) and len(rows) == len(text.split())
        learner.restore()


def test_a_checkpoint_without_augmentation_does_not_mind_its_probability(tmp_path):
    kind = method_named("textboost").settings
    s = json.loads(json.dumps(settings_for(None, "textboost", augment=False).asdict()))  # as a checkpoint holds them
    now = {"base": "a", "base_name": "a", "data": "d", "settings": s}
    was = now | {"settings": s | {"augment_probability": 0.8}}
    check_same_run(tmp_path, was, now, kind)
    on = now | {"settings": s | {"augment": True}}
    with pytest.raises(ValueError, match=r"augment_probability was 0\.8 and is 0\.5"):
        check_same_run(tmp_path, on | {"settings": on["settings"] | {"augment_probability": 0.8}}, on, kind)


def test_a_preset_is_given_by_name():
    s = settings_for(None, "custom_diffusion", preset="faces")
    assert (s.variant, s.learning_rate, s.steps, s.augment) == ("crossattn", 5e-6, 750, False)
    assert settings_for(None, "custom_diffusion", preset="faces", steps=2000).steps == 2000
    with pytest.raises(ValueError, match="custom_diffusion has no preset 'face'; it has faces"):
        settings_for(None, "custom_diffusion", preset="face")
    with pytest.raises(ValueError, match="dreambooth has no preset 'faces'; it has none"):
        settings_for(None, "dreambooth", preset="faces")
