"""The prior term without class images: its target is the base model's prediction, whatever has been learned since."""

from __future__ import annotations

import pytest
import torch
from pcs_trainer import load_model
from pcs_trainer.data import prior
from pcs_trainer.memory import plan
from pcs_trainer.memory.networks import networks_of
from pcs_trainer.memory.planner import cost_of_prior
from pcs_trainer.memory.rehearsal import FROZEN_COPY, Rehearsal
from pcs_trainer.methods import settings_for
from pcs_trainer.methods.dreambooth import DreamBooth
from pcs_trainer.model.text import encode
from pcs_trainer.training.checkpoint import check_same_run
from trainer_cases import cache, trainer

__all__ = ["cache"]

OWN = dict(prior="own", prior_weight=0.5, resolution=64, probe_every=0)
# What is switched off for the base model's prediction: whole values, some of them, residuals, residuals on the text.
CASES = {
    "dreambooth": dict(train_text_encoder=True),
    "dreambooth_lora": dict(init="both_random"),
    "custom_diffusion": dict(variant="crossattn"),
    "textboost": dict(variant="v1", batch=2),
}


def disturbed(learner):
    """Everything that trains, elsewhere."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in learner.parameters.values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("method", CASES)
def test_the_target_is_the_base_models_prediction_for_the_class(model, method):
    run = trainer(model, method, **CASES[method], **OWN)
    try:
        objective = run.objective()
        disturbed(run.learner)
        now = {n: p.detach().clone() for n, p in run.learner.parameters.items()}
        batch = objective.batch(3, 0)
        half = batch.subjects
        with torch.no_grad():
            predicted, target, _ = objective.predicted(objective.inputs(batch))
            _, parts = objective.loss(batch, 3)
        assert all(torch.equal(now[n], p) for n, p in run.learner.parameters.items())
    finally:
        run.learner.restore()
    assert batch.prompts[half:] == run.task.class_prompts * half
    for same in (batch.latents, batch.noise, batch.t):
        assert torch.equal(same[:half], same[half:])
    a = model.schedule.abar[batch.t].view(-1, 1, 1, 1)
    noisy = a.sqrt() * batch.latents + (1 - a).sqrt() * batch.noise
    with torch.no_grad():
        base = model.unet(noisy[half:], batch.t[half:], encode(model, batch.prompts[half:]).states)
    torch.testing.assert_close(target[half:], base, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(predicted[half:], base, atol=1e-2)
    assert parts["prior"] == pytest.approx(float((predicted - target)[half:].pow(2).mean()), rel=1e-4)


def test_a_class_that_has_not_moved_costs_nothing(model, monkeypatch):
    """And no class image is sampled."""
    monkeypatch.setattr(prior, "draw_prior", lambda *_: pytest.fail("class images are sampled"))
    run = trainer(model, "dreambooth_lora", **OWN)
    objective = run.objective()
    _, parts = objective.loss(objective.batch(0, 0), 0)
    run.learner.restore()
    assert objective.data.prior is None and parts["prior"] < 1e-9 < parts["subject"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dreambooth", "custom_diffusion"])
def test_a_resumed_run_is_the_same_bit_for_bit(model, method, tmp_path):
    whole = trainer(model, method, tmp_path / "whole", steps=2, **OWN).train()
    trainer(model, method, tmp_path / "parts", steps=1, **OWN).train()
    parts = trainer(model, method, tmp_path / "parts", steps=2, **OWN).train(resume=True)
    assert whole.tensors.keys() == parts.tensors.keys()
    assert all(torch.equal(whole.tensors[n], parts.tensors[n]) for n in whole.tensors)


@pytest.mark.slow
def test_the_model_is_as_it_was_after_a_run(model):
    before = {n: p.detach().clone() for n, p in model.unet.named_parameters()}
    for method in ("dreambooth_lora", "custom_diffusion"):
        trainer(model, method, steps=1, **OWN).train()
        assert all(torch.equal(before[n], p) for n, p in model.unet.named_parameters())


def test_what_makes_no_sense_is_one_sentence(model):
    with pytest.raises(ValueError, match="does nothing at prior_weight 0"):
        settings_for(model, "personalized_residuals", prior="own")
    with pytest.raises(ValueError, match="uses no class images; leave out prior_folder"):
        settings_for(model, "dreambooth", prior="own", prior_folder="dogs")
    for variant in ("causal", "causal++"):
        for held in (OWN, dict(prior_weight=1.0)):
            with pytest.raises(ValueError, match="has no gradient in textboost's variant 'causal"):
                settings_for(None, "textboost", variant=variant, **held)
    with pytest.raises(ValueError, match="has no gradient in textual_inversion"):
        settings_for(None, "textual_inversion", **OWN)
    assert settings_for(None, "textboost", variant="v1", **OWN).prior == "own"
    with pytest.raises(ValueError, match="prior must be one of drawn, own"):
        settings_for(model, "dreambooth", prior="mine")


def test_the_plan_counts_the_copy_that_a_whole_network_needs():
    networks = networks_of(load_model("tiny"))
    copies = {}
    for method, kind in (("dreambooth", "drawn"), ("dreambooth", "own"), ("dreambooth_lora", "own")):
        s = settings_for(None, method, prior=kind, steps=30)
        found = Rehearsal(networks, s, (2, 16), torch.bfloat16).weights(s)
        copies[method, kind] = found[FROZEN_COPY] / found["UNet weights"]
    assert copies == {("dreambooth", "drawn"): 0, ("dreambooth", "own"): 1, ("dreambooth_lora", "own"): 0}


@pytest.mark.slow
def test_the_plan_says_what_the_prior_loss_costs():
    said = str(plan("tiny", "dreambooth_lora", resolution=32, prior="own", steps=30))
    assert "prior loss: no class images; one forward more in each step without gradients (60 images in all)" in said
    drawn = cost_of_prior(settings_for(None, "dreambooth", prior_images=32), False)
    assert "32 class images, sampled before step 1 by 1600 forwards" in drawn


def test_a_checkpoint_that_knows_no_prior_kind_was_made_with_class_images(tmp_path):
    now = {"base": "a", "base_name": "a", "data": "d", "settings": settings_for(None, "dreambooth").asdict()}
    now["settings"]["preview_prompts"] = []
    was = now | {"settings": {n: v for n, v in now["settings"].items() if n != "prior"}}
    check_same_run(tmp_path, was, now, DreamBooth)
    with pytest.raises(ValueError, match="prior was 'drawn' and is 'own'"):
        check_same_run(tmp_path, was, now | {"settings": now["settings"] | {"prior": "own"}}, DreamBooth)
