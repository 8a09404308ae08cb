"""What each method trains on the real configuration; its data and its losses, computed again here."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pcs_trainer import load_model
from pcs_trainer.data import augment, prompts
from pcs_trainer.data.batches import Bank, draw_batch, seeded
from pcs_trainer.methods import custom_diffusion, settings_for, textboost
from pcs_trainer.methods.start import learner_for
from pcs_trainer.model.autoencoder import Moments
from pcs_trainer.model.schedule import Schedule
from pcs_trainer.model.text import encode
from pcs_trainer.training import losses
from pcs_trainer.training.trainer import Trainer, trainable
from pcs_trainer.unet.unet import UNet
from unet_families import SD15_REAL, SD21_REAL

SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture(scope="module")
def sd14(tiny):
    """The real networks without weights; the small model's tokenizer serves: its ids are below the real table's."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408
    )
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(**config))
    unet = UNet.from_config(SD15_REAL, device="meta")
    return SimpleNamespace(
        unet=unet, text_encoders=[encoder], text_encoder=encoder, tokenizers=[tiny.tokenizer], embedded=False,
        name="SD1.4", release=lambda *parts: None,
    )  # fmt: skip


def count(found, words=True):
    return sum(p.numel() for n, p in found.items() if words or not n.startswith("word."))


def test_dreambooth(sd14):
    whole = trainable(sd14, "dreambooth")
    assert count(whole) == 859_520_964
    assert set(whole) == {f"unet.{n}" for n, _ in sd14.unet.named_parameters()}
    assert count(trainable(sd14, "dreambooth", train_text_encoder=True)) == 859_520_964 + 123_060_480


def test_dreambooth_lora(sd14):
    found = trainable(sd14, "dreambooth_lora")
    assert count(found) == 797_184
    assert count(trainable(sd14, "dreambooth_lora", rank=16)) == 199_296 * 16
    layers = {n.rsplit(".", 1)[0].split(".transformer_blocks.0.")[1] for n in found}
    assert layers == {f"attn{i}.{p}" for i in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")}


def test_lora_fa(sd14):
    """The second halves alone; the first are in the concept all the same."""
    found = trainable(sd14, "lora_fa")
    assert count(found) == 99_840 * 8 and all(n.endswith(".up") for n in found)
    learner = learner_for(sd14, [settings_for(None, "lora_fa", identifier="plain")])
    assert len(learner.fixed) == len(found) and all(n.endswith(".down") for n in learner.fixed)
    learner.restore()


def test_a_setup_that_attaches_nothing_is_one_sentence(sd14, monkeypatch):
    from pcs_trainer.methods import dreambooth_lora

    monkeypatch.setattr(dreambooth_lora, "PROJECTIONS", ("to_query",))
    with pytest.raises(ValueError, match="dreambooth_lora trains nothing on this model"):
        trainable(sd14, "dreambooth_lora")


def test_custom_diffusion(sd14):
    found = trainable(sd14, "custom_diffusion")
    assert count(found) == 19_169_280 + 768 and count(found, words=False) == 19_169_280
    names = [n for n in found if n.startswith("unet.")]
    assert len(names) == 32 and all(n.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for n in names)
    assert count(trainable(sd14, "custom_diffusion", variant="crossattn"), words=False) == 43_962_560


def test_personalized_residuals(sd14):
    found = trainable(sd14, "personalized_residuals")
    assert count(found) == 1_239_040 and len(found) == 32
    ranks = {tuple(p.shape) for n, p in found.items() if n.endswith(".down")}
    assert ranks == {(16, 320), (32, 640), (64, 1280)}
    assert all(".proj_out." in n for n in found)
    with_word = trainable(sd14, "personalized_residuals", train_token=True)
    assert count(with_word) == 1_239_040 + 768


def test_personalized_residuals_on_linear_projections(sd14, tiny):
    model = SimpleNamespace(**vars(sd14)) if hasattr(sd14, "__dict__") else sd14
    model.unet = UNet.from_config(SD21_REAL, device="meta")
    assert count(trainable(model, "personalized_residuals")) == 1_239_040


def test_textboost(sd14):
    found = trainable(sd14, "textboost", class_word="dog")
    rows = {n: p for n, p in found.items() if n.startswith("word.")}
    assert count(found, words=False) == 663_552
    assert sum(p.numel() for n, p in rows.items() if "<aug-" in n) == 9_216
    assert [tuple(p.shape) for n, p in rows.items() if "<aug-" not in n] == [(1, 768)]
    assert count(trainable(sd14, "textboost", variant="qkv"), words=False) == 221_184
    assert count(trainable(sd14, "textboost", variant="causal"), words=False) == 46_080
    assert count(trainable(sd14, "textboost", variant="causal++"), words=False) == 70_656


def test_textual_inversion_trains_rows_alone(sd14):
    found = trainable(sd14, "textual_inversion", class_word="mug")
    assert list(found) == ["word.0.<mug>"] and count(found) == 768
    with pytest.raises(ValueError, match="identifier"):
        trainable(sd14, "textual_inversion", identifier="rare")


def test_every_setup_leaves_the_model_as_it_was(tiny):
    before = {n: p.detach().clone() for n, p in tiny.unet.named_parameters()}
    for method in ("dreambooth_lora", "custom_diffusion", "personalized_residuals", "textboost"):
        assert trainable(tiny, method, class_word="mug")
        assert not any(p.requires_grad for p in tiny.unet.parameters())
        assert not any(layer.residuals for layer in tiny.unet.modules() if hasattr(layer, "residuals"))
    assert all(torch.equal(before[n], p) for n, p in tiny.unet.named_parameters())


def test_a_learned_word_is_no_part_of_the_table(tiny):
    """Its rows are leaves of their own: the table gets no gradient, the optimizer no state for it."""
    found = trainable(tiny, "textual_inversion", class_word="mug")
    rows = found["word.0.<mug>"]
    encode(tiny, ["a <mug>"], {"<mug>": [rows]}).states.sum().backward()
    assert rows.grad is not None and rows.grad.abs().sum() > 0
    assert tiny.text_encoder.get_input_embeddings().weight.grad is None


# losses


@pytest.mark.slow
def test_prior_weight_and_snr_weight_reach_both_halves(tiny):
    """The trainer's loss equals a few lines computed here."""
    from pcs_trainer.tiny.subjects import photos

    pictures = [p.picture for p in photos(31, 2)]
    trainer = Trainer(
        tiny, "dreambooth_lora", pictures, class_word="mug", prior_weight=0.7, snr_gamma=2.0, prior_images=2,
        prior_steps=2, batch=2, init="both_random",
    )  # fmt: skip
    run = trainer.objective()
    batch = run.batch(0, 0)
    total, parts = run.loss(batch, 0)
    a = tiny.schedule.abar[batch.t].view(-1, 1, 1, 1)
    noisy = a.sqrt() * batch.latents + (1 - a).sqrt() * batch.noise
    target = a.sqrt() * batch.noise - (1 - a).sqrt() * batch.latents  # the tiny model predicts velocity
    with torch.no_grad():
        states = encode(tiny, batch.prompts).states
        error = (tiny.unet(noisy, batch.t, states) - target).pow(2).mean((1, 2, 3))
    snr = (a / (1 - a)).flatten()
    weighted = error * torch.minimum(snr, torch.tensor(2.0)) / (snr + 1)
    expected = weighted[:2].mean() + 0.7 * weighted[2:].mean()
    torch.testing.assert_close(total.detach(), expected, rtol=1e-4, atol=1e-6)
    assert parts["prior"] == pytest.approx(float(weighted[2:].mean()), rel=1e-4)
    trainer.learner.restore()


def test_the_masked_loss_is_a_true_masked_mean():
    prediction, target = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    mask = torch.zeros(2, 1, 6, 6)
    mask[0, 0, 1:3, 2:5] = 1
    mask[1] = 1
    error = (prediction - target) ** 2
    expected = torch.stack([error[0][:, 1:3, 2:5].mean(), error[1].mean()])
    torch.testing.assert_close(losses.picture_losses(prediction, target, mask), expected)


def test_snr_weights_of_noise_prediction():
    schedule = Schedule.from_config(SD)
    t = torch.tensor([5, 500, 990])
    snr = schedule.abar[t] / (1 - schedule.abar[t])
    torch.testing.assert_close(losses.snr_weights(schedule, t, 5.0), torch.minimum(snr, torch.tensor(5.0)) / snr)


def test_the_snr_law_has_the_published_figures():
    p = losses.snr_law(Schedule.from_config(SD))
    t = torch.arange(1000, dtype=torch.float64)
    assert p[0] == 0
    assert [round(float(p[i] * 1000), 2) for i in (100, 500, 999)] == pytest.approx([0.61, 1.0, 1.55], abs=0.015)
    assert float((p * t).sum()) == pytest.approx(584, abs=1)
    assert float(p[500:].sum()) == pytest.approx(0.62, abs=0.005)
    drawn = losses.drawn_timesteps(Schedule.from_config(SD), "snr", 20_000, seeded(1))
    assert float(drawn.double().mean()) == pytest.approx(584, abs=6)


def test_knowledge_preservation_is_one_minus_cosine_over_all_positions():
    tuned, frozen = torch.randn(3, 77, 8), torch.randn(3, 77, 8)
    cosine = (tuned * frozen).sum(-1) / (tuned.norm(dim=-1) * frozen.norm(dim=-1))
    torch.testing.assert_close(textboost.preservation_loss(tuned, frozen), (1 - cosine).sum() / (3 * 77))


def test_the_bank_of_general_captions(tiny):
    bank = textboost.preserved_captions(tiny, [settings_for(tiny, "textboost", class_word="mug")], 200)
    assert bank.count("") == 20 and bank.count("a photo of a mug") == 20 and len(set(bank)) > 120


def test_first_token_keys_and_values_have_no_gradient():
    k, v = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    held = custom_diffusion.without_first_gradient({"b": (k, v)})["b"]
    assert torch.equal(held[0], k) and torch.equal(held[1], v)
    (held[0].sum() + held[1].sum()).backward()
    for x in (k, v):
        assert not x.grad[:, 0].any() and bool((x.grad[:, 1:] == 1).all())


# data


def picture(size=64):
    return np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)


def test_custom_diffusions_prefixes_agree_with_the_geometry():
    seen = {"far": 0, "same": 0, "near": 0}
    white = np.full((64, 64, 3), 250, np.uint8)
    for i in range(300):
        shown = augment.custom_diffusion(augment.Shown(white), 64, 16, seeded(i))
        assert shown.pixels.shape == (64, 64, 3)
        grey = (shown.pixels == 127).all(-1)
        if shown.prefix in augment.FAR:
            seen["far"] += 1
            rows, columns = np.where(~grey)
            side = rows.max() - rows.min() + 1
            assert 64 / 3 - 1 <= side < 0.6 * 64 and side == columns.max() - columns.min() + 1
            inside = np.kron(shown.mask, np.ones((4, 4))) > 0
            assert inside.any() and not (inside & grey).any()  # the mask lies within the pasted picture
        else:
            assert shown.mask is None and not grey.any()
            seen["near" if shown.prefix in augment.NEAR else "same"] += 1
            assert shown.prefix in (*augment.NEAR, "")
    shares = {k: v / 300 for k, v in seen.items()}
    assert shares["near"] == pytest.approx(1 / 3, abs=0.08)
    assert shares["far"] == pytest.approx(2 / 3 * 0.4, abs=0.08)  # [1/3, 0.6) of [1/3, 1]


def test_every_augmentation_word_is_reached_and_named_for_what_was_done():
    source = picture()
    said = {}
    for i in range(400):
        shown = augment.textboost(augment.Shown(source), 64, 0.8, seeded(9, i))
        assert shown.pixels.shape == (64, 64, 3)
        for word in shown.prefix.split():
            said[word] = said.get(word, 0) + 1
        if shown.prefix == f"{augment.word('flip')} ":
            assert np.array_equal(shown.pixels, source[:, ::-1])
        if shown.prefix == "":
            unchanged = np.array_equal(shown.pixels, source)
            assert unchanged or shown.mask is None  # scaled by little: it has no name
        if augment.word("grayscale") in shown.prefix:
            assert (np.ptp(shown.pixels.astype(int), axis=-1) == 0).all()
        if shown.prefix.startswith(augment.word("left")) and shown.prefix.strip() == augment.word("left"):
            by = next(b for b in range(1, 30) if np.array_equal(shown.pixels[:, : 64 - b], source[:, b:]))
            assert 0.15 * 64 - 1 <= by <= 0.30 * 64 + 1
    assert set(said) == {augment.word(name) for name in augment.WORDS}
    assert sum(count for _, count in augment.WORDS.values()) == 12


def test_every_augmentation_row_gets_a_gradient(tiny):
    chosen = dict(class_word="mug", token="<v>", augment=True, augment_probability=0.8, variant="v1")
    settings = settings_for(tiny, "textboost", **chosen)
    learner = learner_for(tiny, [settings])
    said = [
        augment.textboost(augment.Shown(picture()), 64, 0.8, seeded(i)).prefix + "a photo of a <v> mug"
        for i in range(120)
    ]
    encode(tiny, said, learner.rows, hold_first=True).states.square().sum().backward()
    rows = {n: p for n, p in learner.parameters.items() if n.startswith("word.")}
    assert len(rows) == 9 and all(p.grad is not None and bool((p.grad != 0).any(1).all()) for p in rows.values())
    learner.restore()


def test_held_text_and_the_causal_form(tiny):
    """The first token and the empty prompt stay as they were; the causal form leaves all before V* untouched."""
    with torch.no_grad():
        frozen = encode(tiny, ["a photo of a <v> mug on a table", ""], {"<v>": prompts.first_rows(tiny, "mug")}).states
    for variant in ("v1", "causal"):
        s = settings_for(tiny, "textboost", class_word="mug", token="<v>", variant=variant, init="both_random")
        learner = learner_for(tiny, [s])
        with torch.no_grad():
            for p in learner.parameters.values():
                p.add_(torch.randn(p.shape, generator=seeded(1)) * 0.1)
            learner.words["<v>"].rows = prompts.first_rows(tiny, "mug")
            text = encode(tiny, ["a photo of a <v> mug on a table", ""], learner.rows, hold_first=True)
        place = text.places(0, "<v>")[0]
        torch.testing.assert_close(text.states[0, 0], frozen[0, 0])
        torch.testing.assert_close(text.states[1], frozen[1])
        assert not torch.allclose(text.states[0, place:], frozen[0, place:], atol=1e-3)
        if variant == "causal":
            assert torch.equal(text.states[0, 1:place], frozen[0, 1:place])
        learner.restore()


def test_the_blocks_own_text_from_the_word_on(tiny):
    """causal++: each block reads states of its own, changed from V* on alone."""
    s = settings_for(tiny, "textboost", class_word="mug", token="<v>", variant="causal++", init="both_random")
    learner = learner_for(tiny, [s])
    generator = seeded(2)
    with torch.no_grad():
        for name, p in learner.parameters.items():
            if name.startswith("context."):
                p.normal_(0, 0.3, generator=generator)
    text = encode(tiny, ["a photo of a <v> mug", "a <v>"], learner.rows, hold_first=True)
    place = text.places(0, "<v>")[0]
    first, second = (text.states[name] for name in tiny.unet.attention_names()[:2])
    assert torch.equal(first[0, :place], second[0, :place])
    assert not torch.allclose(first[0, place], second[0, place], atol=1e-3)
    first.sum().backward()
    names = [n for n in learner.parameters if n.startswith(f"context.{tiny.unet.attention_names()[0]}.")]
    assert len(names) == 2 and all(float(learner.parameters[n].grad.abs().sum()) > 0 for n in names)
    learner.restore()


def test_rows_stay_within_the_tables_mean_norm(tiny):
    rows = torch.randn(2, 128) * 50
    textboost.limit_norms(tiny, {"<v>": [rows]})
    limit = tiny.text_encoder.get_input_embeddings().weight.norm(dim=1).mean()
    assert bool((rows.norm(dim=1) <= limit * 1.0001).all())


def test_processes_share_a_batch_of_the_same_examples():
    moments = Moments(torch.randn(5, 2, 4, 4), torch.rand(5, 2, 4, 4))
    bank, law = Bank(moments, [f"p{i}" for i in range(5)]), lambda n, g: torch.randint(1000, (n,), generator=g)
    s, both = SimpleNamespace(seed=3, batch=2), SimpleNamespace(seed=3, batch=4)
    names = list("abcde")
    halves = [draw_batch(bank, bank, names, s, 7, 0, (rank, 2), law) for rank in (0, 1)]
    one = draw_batch(bank, bank, names, both, 7, 0, (0, 1), law)
    joined = torch.cat([halves[0].latents[:2], halves[1].latents[:2], halves[0].latents[2:], halves[1].latents[2:]])
    assert torch.equal(joined, one.latents)
    assert torch.equal(torch.cat([halves[0].t[:2], halves[1].t[:2]]), one.t[:4])


def test_wrong_settings_are_one_sentence(tiny):
    for wrong, said in (
        (dict(stepps=3), "did you mean 'steps'"), (dict(steps=0), "steps"), (dict(learning_rate=-1.0), "learning_rate"),
        (dict(resolution=65), "multiple of 8"), (dict(template="a photo"), "subject"),
        (dict(optimizer="sgd"), "adamw8bit"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            settings_for(tiny, "dreambooth", **wrong)
    with pytest.raises(ValueError, match="did you mean 'dreambooth'"):
        settings_for(tiny, "dreambooht")
