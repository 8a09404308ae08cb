"""The proofs of a run: gradients against the reference, what has moved and what not. Small runs, embedded model."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from pcs_trainer import load_model
from pcs_trainer.errors import NotTrained
from pcs_trainer.training.optimizer import has_average
from pcs_trainer.training.proof import Movement
from pcs_trainer.training.run import PROOF_STEP
from pcs_trainer.training.trainer import Trainer
from trainer_cases import SMALL, cache, pictures, trainer

from pcs_kernels.optim import AdamW8bit
from tests import needs

__all__ = ["cache"]


def test_a_tensor_that_does_not_train_is_named(model):
    t = trainer(model, steps=5)
    name = "unet.mid_block.attentions.0.proj_out.up"
    t.trainable()[name].register_hook(torch.zeros_like)
    t.settings.weight_decay = 0.0
    with pytest.raises(NotTrained, match=r"mid_block\.attentions\.0\.proj_out"):
        t.train()


@pytest.mark.slow
def test_a_frozen_tensor_that_moves_is_named(model):
    t = trainer(model, steps=3)

    def meddle(event):
        if event.kind == "step":
            with torch.no_grad():
                model.unet.conv_in.bias.add_(1e-3)

    before = model.unet.conv_in.bias.detach().clone()
    with pytest.raises(NotTrained, match=r"conv_in\.bias is frozen"):
        t.train(on_event=meddle)
    with torch.no_grad():
        model.unet.conv_in.bias.copy_(before)


@needs.native
def test_a_backend_with_wrong_gradients_is_found_before_step_1(model, monkeypatch):
    from pcs_kernels.ops.geglu import native_impl

    honest = native_impl.backward
    monkeypatch.setattr(native_impl, "backward", lambda dy, x: honest(dy, x) * 1.5)
    with pytest.raises(NotTrained, match="away from the reference's"):
        trainer(model, steps=2, check_backend=True, plan="eager", init="both_random").train()


def test_movement_is_told_by_bits_not_by_sums():
    """bfloat16 weights at small rates flip up as often as down: their sum stays while they train."""
    for seed in range(50):
        values = torch.randn(320, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        trained, still = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
        movement = Movement({"trained": trained, "still": still}, [("frozen", values)])
        bits = trained.data.view(torch.int16)
        up, down = torch.randperm(320, generator=torch.Generator().manual_seed(seed))[:2]
        bits[up] += 1
        bits[down] -= 1
        assert movement.unmoved() == ["still"] and movement.moved_frozen() == []
    movement.stepped({"trained": 1e-2, "still": 1e-2})
    with pytest.raises(NotTrained, match="still has not moved"):
        movement.check(lambda p: True)


@pytest.mark.slow
def test_a_word_that_no_picture_reached_is_no_fault_and_is_told(model):
    both = [
        {"images": pictures(12, seed=61), "class_word": "mug", "token": "<one>"},
        {"images": pictures(1, seed=62), "class_word": "cat", "token": "<two>"},
    ]
    for seed in range(50):  # until two steps draw none of the cat's
        t = Trainer(model, "custom_diffusion", concepts=both, **SMALL, steps=2, prior_weight=0.0, seed=seed)
        objective = t.objective()
        drawn = [prompt for step in range(2) for prompt in objective.batch(step, 0).prompts]
        t.learner.restore()
        t = Trainer(model, "custom_diffusion", concepts=both, **SMALL, steps=2, prior_weight=0.0, seed=seed)
        if not any("<two>" in prompt for prompt in drawn):
            break
    events = []
    t.train(on_event=events.append)
    told = [e.data["text"] for e in events if e.kind == "warning"]
    assert any("no picture of this run reached word.0.<two>" in text for text in told)


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [0, 100, 500])
def test_bfloat16_weights_at_a_small_rate_train_and_a_stuck_one_is_found(warmup):
    """DreamBooth's rate on norm weights as SD1.5 has them: 29 of 320 numbers. Few bits flip in 20 steps."""
    generator = torch.Generator().manual_seed(warmup)

    def movement_of(broken):
        """20 steps of a toy of norms and one large layer; what the proof says."""
        norms = {f"norm{i}": torch.rand(320, generator=generator) * 0.8 + 0.2 for i in range(29)}
        weights = norms | {"large": torch.randn(320, 320, generator=generator) * 0.05}
        trained = {name: torch.nn.Parameter(w.bfloat16()) for name, w in weights.items()}
        optimizer = AdamW8bit(list(trained.values()), seed=warmup)
        movement = Movement(trained, [])
        for step in range(20):
            rate = 5e-6 * min(1.0, (step + 1) / max(1, warmup))
            for name, p in trained.items():
                p.grad = torch.randn(p.shape, generator=generator).bfloat16() * (0 if name == broken else 1)
            before = trained["large"].detach().clone()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            if broken == "unwritten":
                trained["large"].data.copy_(before)
            movement.stepped(dict.fromkeys(trained, rate))
        return movement.check(partial(has_average, optimizer))

    for _ in range(20):
        assert "29 trainable" in movement_of("") or "30 trainable" in movement_of("")
        with pytest.raises(NotTrained, match="norm7 gets no gradient"):
            movement_of("norm7")
    if not warmup:  # at the full rate a large tensor's bits must change
        with pytest.raises(NotTrained, match="large has not moved"):
            movement_of("unwritten")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("held", "said"),
    [
        ("", r"\d+ of \d+ trainable tensors have moved.*below what 16 bits show so soon"),
        ("no gradient", r"gets no gradient \(1 of \d+ tensors\)"),
        ("not written", r"has not moved \(1 of \d+ tensors\)"),
    ],
    ids=["none is", "no gradient", "not written"],
)
def test_dreambooth_in_bfloat16_at_a_small_rate_passes_the_proof_unless_a_tensor_is_held(held, said):
    """Its own rate with a long warm-up: at step 20 many small tensors have kept every bit, and all of them train."""
    settings = {
        "learning_rate": 5e-6,
        "warmup": 100,
        "prior_weight": 0.0,
        "probe_every": 0,
        "steps": 21,
        "resolution": 32,
    }
    t = trainer(load_model("tiny", torch.bfloat16), "dreambooth", **settings)
    name, largest = max(t.trainable().items(), key=lambda found: found[1].numel())
    before, told = largest.detach().clone(), []

    def see(event):
        if event.kind == "step" and held == "not written":
            with torch.no_grad():
                largest.copy_(before)
        if event.kind == "proof":
            told.append((event.step, event.data["text"]))

    if held == "no gradient":
        largest.register_hook(torch.zeros_like)
    if held:
        with pytest.raises(NotTrained, match=re.escape(name) + " " + said):
            t.train(on_event=see)
        return
    t.train(on_event=see)
    assert told[0][0] == PROOF_STEP and re.match(said, told[0][1]), told
