"""Training the text encoder: what of it trains, at which rate, and what older versions made of it."""

from __future__ import annotations

import json

import pytest
import torch
from pcs_trainer import load_model
from pcs_trainer.cli.commands import command
from pcs_trainer.cli.commands.train_flags import overrides
from pcs_trainer.cli.config import effective
from pcs_trainer.cli.options import parse
from pcs_trainer.concept.loading import load_concept
from pcs_trainer.methods import settings_for
from pcs_trainer.methods.start import learner_for
from pcs_trainer.training.optimizer import Stepper
from pcs_trainer.training.run import PROOF_STEP
from pcs_trainer.training.trainer import Trainer, trainable
from test_family_training import SETTINGS, pictures
from test_methods import count, sd14, tiny
from test_model_loading import text_config, write_model
from trainer_cases import cache, small_for, trainer

__all__ = ["cache", "sd14", "tiny"]
STARTED = dict(train_text_encoder=True, resolution=64, probe_every=0)


def test_lora_trains_q_k_v_and_out_of_the_encoder(sd14):
    found = trainable(sd14, "dreambooth_lora", train_text_encoder=True)
    text = {n: p for n, p in found.items() if n.startswith("text_encoder.")}
    assert count(text) == 12 * 4 * 2 * 768 * 4 and count(found) - count(text) == 797_184
    ends = {n.split("self_attn.")[1].split(".")[0] for n in text}
    assert ends == {"q_proj", "k_proj", "v_proj", "out_proj"} and len(text) == 2 * 4 * 12
    whole = trainable(sd14, "dreambooth_lora", train_text_encoder=True, text_encoder_form="whole")
    assert count({n: p for n, p in whole.items() if n.startswith("text_encoder.")}) == 123_060_480


@pytest.mark.parametrize(
    ("method", "chosen", "rates"),
    [
        ("dreambooth", {}, [5e-6, 2e-6]),
        ("dreambooth", {"text_encoder_learning_rate": 1e-6}, [5e-6, 1e-6]),
        ("dreambooth", {"text_encoder_learning_rate": 5e-6}, [5e-6]),
        ("dreambooth_lora", {}, [1e-4]),
        ("dreambooth_lora", {"text_encoder_learning_rate": 5e-5}, [1e-4, 5e-5]),
    ],
)
def test_the_encoder_has_a_rate_of_its_own(tiny, method, chosen, rates):
    s = settings_for(None, method, class_word="mug", token="zwx", train_text_encoder=True, **chosen)
    learner = learner_for(tiny, [s])
    stepper = Stepper(learner, s)
    groups = stepper.optimizer.param_groups
    assert [g["lr"] for g in groups] == pytest.approx(rates) == stepper.rates
    if len(rates) == 2:
        on_text = {id(p) for n, p in learner.parameters.items() if n.startswith("text_encoder.")}
        assert {id(p) for p in groups[1]["params"]} == on_text
    learner.restore()


def test_a_rate_for_what_does_not_train_is_refused():
    with pytest.raises(ValueError, match="does nothing without train_text_encoder"):
        settings_for(None, "dreambooth", text_encoder_learning_rate=1e-6)


def test_the_flag_of_other_trainers_sets_the_encoders_rate():
    train = command("train")
    words = ["photos", "--class", "dog", "--method", "dreambooth", "--train_text_encoder", "--text_encoder_lr", "3e-6"]
    chosen = overrides(effective(train, parse(train, words)))
    assert chosen["text_encoder_learning_rate"] == 3e-6 and "token_learning_rate" not in chosen


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    root = write_model(tmp_path_factory.mktemp("model") / "sdxl", "sdxl")
    half = text_config()
    half.hidden_size = 12  # the two encoders' states stand side by side
    half.eos_token_id = 53  # the tokenizer's: the pooled text is the state there
    CLIPTextModel(half).save_pretrained(root / "text_encoder")
    CLIPTextModelWithProjection(half).save_pretrained(root / "text_encoder_2")
    return load_model(root)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dreambooth", "dreambooth_lora"])
def test_all_that_trains_of_sdxls_encoders_has_a_gradient(sdxl, method, tmp_path, monkeypatch):
    """The first encoder's last layer and last norm are behind nothing that the UNet reads."""
    monkeypatch.setenv("PCS_CACHE", str(tmp_path))
    chosen = SETTINGS | small_for(method, init="both_random", train_text_encoder=True)
    run = Trainer(sdxl, method, pictures(), **chosen)
    objective = run.objective()
    objective.loss(objective.batch(0, 0), 0)[0].backward()
    found = {n: p for n, p in run.learner.parameters.items() if n.startswith("text_encoder")}
    last = sdxl.text_encoder.config.num_hidden_layers - 1
    largest = {n: float(p.grad.abs().max()) if p.grad is not None else 0.0 for n, p in found.items()}
    indifferent = run.learner.indifferent
    still = [n for n, size in largest.items() if not size and n not in indifferent]
    run.learner.restore()
    if method == "dreambooth":
        assert len(indifferent) == 3 and all(n.endswith("self_attn.k_proj.bias") for n in indifferent)
        assert max(largest[n] for n in indifferent) < 1e-4 * max(
            largest[n.replace("k_proj", "q_proj")] for n in indifferent
        )
    else:
        assert not indifferent
    assert not still and {n.split(".")[0] for n in found} == {"text_encoder", "text_encoder_2"}
    assert not any(f"layers.{last}." in n or "final_layer_norm" in n for n in found if n.startswith("text_encoder."))
    assert any(f"layers.{last}." in n for n in found if n.startswith("text_encoder_2."))


@pytest.mark.slow
def test_sdxls_whole_encoders_pass_the_proof_in_bfloat16(sdxl, tmp_path, monkeypatch):
    """The gradient of a key's bias is rounding alone; one of the three has zero in every step."""
    monkeypatch.setenv("PCS_CACHE", str(tmp_path))
    chosen = dict(train_text_encoder=True, steps=PROOF_STEP + 1, prior_weight=0.0, check_backend=False, probe_every=0)
    run = Trainer(load_model(sdxl.source.path, torch.bfloat16), "dreambooth", pictures(), **SETTINGS | chosen)
    biases = [p for n, p in run.trainable().items() if n.endswith("k_proj.bias")]
    biases[0].register_hook(torch.zeros_like)
    told = []
    run.train(on_event=lambda e: told.append((e.step, str(e))) if e.kind in ("proof", "warning") else None)
    assert len(biases) == 3 and told[0][0] == PROOF_STEP and "trainable tensors have moved" in told[0][1]
    assert not any("k_proj" in text for _, text in told)


@pytest.mark.slow
def test_an_older_run_with_the_whole_encoder_goes_on(model, tmp_path):
    """Its checkpoint knows neither setting: it is resumed with what that version did, and refused with the fix else."""
    before = dict(STARTED, text_encoder_form="whole", text_encoder_learning_rate=1.5e-3)
    trainer(model, "dreambooth_lora", tmp_path, steps=1, **before).train()
    state = tmp_path / "checkpoint-1" / "state.json"
    found = json.loads(state.read_text())
    for name in ("text_encoder_form", "text_encoder_learning_rate", "prior"):
        del found["settings"][name]
    state.write_text(json.dumps(found))
    old = load_concept(tmp_path / "concept.safetensors", model)
    assert any(n.endswith("token_embedding.weight") for n in old.tensors)
    with pytest.raises(ValueError, match="text_encoder_form was 'whole' and is 'lora'"):
        trainer(model, "dreambooth_lora", tmp_path, steps=2, **STARTED).train(resume=True)
    again = trainer(model, "dreambooth_lora", tmp_path, steps=2, **before).train(resume=True)
    assert again.meta["steps"] == "2" and again.tensors.keys() == old.tensors.keys()


@pytest.mark.slow
def test_a_low_rank_run_with_the_encoder_is_saved_and_loads(model, tmp_path):
    run = trainer(model, "dreambooth_lora", tmp_path, steps=2, **STARTED)
    made = run.train()
    loaded = load_concept(tmp_path / "concept.safetensors", model)
    names = [n for n in loaded.tensors if n.startswith("text_encoder.")]
    assert len(names) == 2 * 4 * model.text_encoder.config.num_hidden_layers and all("self_attn" in n for n in names)
    assert all(torch.equal(made.tensors[n], loaded.tensors[n]) for n in names)
    assert all(bool(loaded.tensors[n].any()) for n in names if n.endswith(".up"))
