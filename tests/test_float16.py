"""Training in float16: gradients of the size of SD1.5's reach the optimizer whole, and the loss scale is found."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from every_case import cases
from pcs_trainer import load_model
from pcs_trainer.errors import NotTrained, TrainingStopped
from pcs_trainer.run_folder import checkpoints
from pcs_trainer.training import float16, optimizer, proof
from pcs_trainer.training.objective import Objective
from pcs_trainer.training.optimizer import Masters, Stepper
from trainer_cases import METHODS, cache, trainer

from pcs_kernels.optim import AdamW8bit, LossScale, loss_scale

__all__ = ["cache"]

SD15 = 4 * 4 * 64 * 64  # values that the loss of a batch of four is the mean of
RANDOM = {"init": "both_random"}  # residuals that start at zero have half of their gradients only
# Where the size is not the point: a CPU's convolutions in float16 are slow.
LITTLE = {"resolution": 32}
SETTINGS = {method: RANDOM for method in ("personalized_residuals", "dreambooth_lora", "lora_fa")}


@pytest.fixture(scope="module")
def models():
    """The embedded model in float32 and float16."""
    return {dtype: load_model("tiny", dtype=dtype) for dtype in (torch.float32, torch.float16)}


def stepped_gradients(model, method, monkeypatch, **settings) -> dict[str, torch.Tensor]:
    """What the first step gives the optimizer, of a loss as small as the mean over SD1.5's values."""
    t = trainer(model, method, clip_norm=0.0, **SETTINGS.get(method, {}), **settings)
    objective = t.objective()
    batch = objective.batch(0, 0)
    names = {p: name for name, p in t.learner.parameters.items()}
    found = {}

    def keep(self, p, group, grad_scale=1.0, finite=None):
        found[names[p]] = p.grad.float() * grad_scale

    def keep_all(self, closure=None, grad_scale=1.0, finite=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    keep(self, p, group, grad_scale)

    monkeypatch.setattr(AdamW8bit, "update", keep)
    monkeypatch.setattr(AdamW8bit, "step", keep_all)
    share = batch.latents.numel() / SD15
    assert Stepper(t.learner, t.settings).step(lambda micro: objective.loss(batch, 0)[0] * share, 0)
    t.learner.restore()
    return found


def apart(found, exact) -> float:
    """The difference of all gradients together, relative to them."""
    difference = torch.stack([(found[n] - exact[n]).norm() for n in exact]).norm()
    return float(difference / torch.stack([g.norm() for g in exact.values()]).norm())


@pytest.mark.slow
@pytest.mark.parametrize("own", [torch.float16, torch.bfloat16])  # the two ends of the sentence
def test_a_run_in_float16_says_what_suits_the_device_better(models, monkeypatch, own):
    """A file's float16 is kept on a GPU where nobody asks for another dtype; text methods train in it as well."""
    monkeypatch.setattr(float16, "training_dtype", lambda kind: (own, f"this {kind} is made for it"))
    said = []
    settings = LITTLE | dict(steps=2, variant="v1", check_backend=True)
    trainer(models[torch.float16], "textboost", **settings).train(on_event=lambda e: said.append(str(e)))
    (scaled,) = [text for text in said if "the loss is scaled" in text]
    better = "; this cpu is made for it: load_model(..., dtype=torch.bfloat16) suits it"
    assert scaled.endswith("overflows" if own == torch.float16 else better)
    assert not any("skipped" in text for text in said)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_gradients_of_float16_are_those_of_float32(models, method, monkeypatch):
    exact = stepped_gradients(models[torch.float32], method, monkeypatch)
    assert apart(stepped_gradients(models[torch.float16], method, monkeypatch), exact) < 0.02  # bfloat16's error
    monkeypatch.setattr(optimizer, "LossScale", partial(LossScale, 1.0))
    assert apart(stepped_gradients(models[torch.float16], method, monkeypatch), exact) > 0.05  # or nothing is shown


@pytest.mark.slow
def test_lost_gradients_are_found_before_step_1(models, monkeypatch):
    """The comparison is with float32, and of a loss as small as the training's."""
    honest = Objective.loss

    def small(self, batch, step, micro=0):
        total, parts = honest(self, batch, step, micro)
        return total * (batch.latents.numel() / SD15), parts

    monkeypatch.setattr(Objective, "loss", small)
    model = models[torch.float16]
    before = {n: p.detach().clone() for n, p in model.unet.named_parameters()}
    events = []
    t = trainer(model, steps=1, check_backend=True, **RANDOM)
    t.train(on_event=events.append)
    said = [e.data["text"] for e in events if e.kind in ("proof", "start")]
    assert any("gradients agree" in text for text in said) and any("the loss is scaled by 65536" in s for s in said)
    monkeypatch.setattr(proof, "LossScale", partial(LossScale, 1.0))
    with pytest.raises(NotTrained, match="away from the reference's"):
        trainer(model, steps=1, check_backend=True, **RANDOM).train()
    after = dict(model.unet.named_parameters())
    assert all(after[n].dtype == torch.float16 and torch.equal(after[n], before[n]) for n in before)


@pytest.mark.slow
def test_the_comparison_is_of_a_loss_as_small_as_the_trainings(models, monkeypatch):
    shares = []
    monkeypatch.setattr(
        "pcs_trainer.training.trainer.compare_gradients",
        lambda parameters, loss, exact, float16: shares.append((len(float16), float(loss().detach()))) or "",
    )
    monkeypatch.setattr(Objective, "loss", lambda self, batch, step, micro=0: (torch.ones(()), {}))
    for dtype, model in models.items():
        t = trainer(model, "dreambooth_lora", batch=3, accumulate=2)
        t._check_gradients(t.objective(), lambda *told, **data: None)
        t.learner.restore()
        assert shares[-1] == ((1, pytest.approx(1 / 6)) if dtype == torch.float16 else (0, 1.0))


def test_a_scale_is_halved_by_an_overflow_and_doubled_after_good_steps(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROW_EVERY", 3)
    scale = LossScale(4.0)
    assert scale.overflowed() and scale.value == 2
    assert scale.overflowed() and scale.value == 1
    assert not scale.overflowed() and scale.value == 1  # unscaled gradients overflow: no scale mends that
    for value in (1, 1, 2, 2, 2, 4):
        scale.fitted()
        assert scale.value == value
    scale.fitted()
    scale.overflowed()  # a step without overflow counts from the last change
    again = LossScale()
    again.load_state_dict(scale.state_dict())
    assert (again.value, again.good_steps) == (2, 0)
    again.value.fill_(loss_scale.MOST)
    for _ in range(3):
        again.fitted()
    assert again.value == loss_scale.MOST


DRIVERS = cases(
    (
        {"step_in_backward": True, "clip": "two_pass"},
        {"step_in_backward": True, "accumulate": 2},
        {"step_in_backward": False},
        {"step_in_backward": False, "optimizer": "adamw"},
    ),
    ({"step_in_backward": True}, {"step_in_backward": True, "clip_norm": 0.0}),
)


@pytest.mark.slow
@pytest.mark.parametrize("settings", DRIVERS)
def test_a_scale_that_is_too_large_is_found_without_ending_the_run(models, settings, monkeypatch):
    """More than three overflows in a row are no fault of the learning rate."""
    monkeypatch.setattr(optimizer, "LossScale", partial(LossScale, 2.0**28))
    events = []
    concept = trainer(models[torch.float16], steps=12, **LITTLE, **settings).train(on_event=events.append)
    skipped = [e for e in events if e.kind == "warning"]
    assert all("a float16 gradient overflowed; the loss scale goes from" in e.data["text"] for e in skipped)
    assert [e.step for e in skipped][:4] == [1, 2, 3, 4]
    assert len(skipped) + sum(e.kind == "step" for e in events) == 12 and len(skipped) < 12
    assert concept.meta["finished"] == "1" and all(bool(x.isfinite().all()) for x in concept.tensors.values())


@pytest.mark.slow
def test_what_no_scale_mends_ends_the_run_in_three_steps(models, monkeypatch):
    monkeypatch.setattr(optimizer, "LossScale", partial(LossScale, 2.0))
    t = trainer(models[torch.float16], steps=9)
    next(iter(t.trainable().values())).register_hook(lambda g: g * float("inf"))
    events = []
    with pytest.raises(TrainingStopped, match="three steps in a row"):
        t.train(on_event=events.append)
    assert [e.step for e in events if e.kind == "warning"] == [1, 2, 3, 4]  # 2 to 1, and three that count


@pytest.mark.slow
# A whole network in float16 resumes below, with its copies; in 8 bits it takes a CPU 20 seconds.
@pytest.mark.parametrize("method", cases(["personalized_residuals"], ["dreambooth"]))
def test_a_resumed_run_goes_on_with_its_scale(models, method, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "GROW_EVERY", 2)
    model, settings = models[torch.float16], LITTLE | {"learning_rate": 1e-4}
    whole = trainer(model, method, steps=5, **settings).train()
    trainer(model, method, tmp_path, steps=3, **settings).train()
    state = checkpoints(tmp_path)[-1] / "optimizer.pt"
    saved = torch.load(state, weights_only=True)
    assert saved["scale"] == {"value": 2 * loss_scale.START, "good_steps": 1}
    resumed = trainer(model, method, tmp_path, steps=5, **settings).train(resume=True)
    assert all(torch.equal(whole.tensors[n], resumed.tensors[n]) for n in whole.tensors)


def test_a_checkpoint_from_before_the_scale_loads(models):
    t = trainer(models[torch.float16], "personalized_residuals")
    stepper = Stepper(t.learner, t.settings)
    state = stepper.state_dict()
    del state["scale"]
    stepper.load_state_dict(state)
    assert stepper.scale.value == loss_scale.START
    t.learner.restore()
    assert Stepper(trainer(models[torch.float32]).learner, t.settings).scale is None


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("size", (0.02, 1.0))
def test_torchs_adamw_moves_16_bit_weights_as_far_as_float32_ones(dtype, size):
    torch.manual_seed(0)
    start = (torch.randn(2000) * size).to(dtype)
    way = {}
    for kind in (torch.float32, dtype):
        p = torch.nn.Parameter(start.to(kind, copy=True))
        masters = Masters([p])
        opt = torch.optim.AdamW([masters.of[p]], lr=5e-6, weight_decay=0.0)
        generator = torch.Generator().manual_seed(1)
        drift = torch.randn(start.shape, generator=generator)
        for _ in range(100):
            p.grad = (2.0**-20 * (drift + torch.randn(start.shape, generator=generator))).float().mul(2.0**20).to(kind)
            masters.take_gradients(2.0**-20)  # as small as float16 has no digits for
            opt.step()
            masters.give_values()
        assert torch.equal(masters.of[p].to(kind), p)
        way[kind] = masters.of[p].detach() - start.float()
    covered = float(way[dtype] @ way[torch.float32] / way[torch.float32].square().sum())
    assert covered == pytest.approx(1, abs=0.01)  # gradients of 16 bits, sums of 32


@pytest.mark.slow
def test_torchs_adamw_resumes_with_its_float32_copies(models, tmp_path):
    model, settings = models[torch.float16], {"optimizer": "adamw", "step_in_backward": False, "learning_rate": 3e-4}
    settings |= LITTLE
    whole = trainer(model, "dreambooth", steps=4, **settings).train()
    trainer(model, "dreambooth", tmp_path, steps=2, **settings).train()
    resumed = trainer(model, "dreambooth", tmp_path, steps=4, **settings).train(resume=True)
    assert all(torch.equal(whole.tensors[n], resumed.tensors[n]) for n in whole.tensors)
    state = checkpoints(tmp_path)[-1] / "optimizer.pt"
    assert all(m.dtype == torch.float32 for m in torch.load(state, weights_only=True)["masters"])


def test_copies_that_a_checkpoint_lacks_are_the_parameters():
    """One of version 0.1.0, or of the same run in float32."""
    p = torch.nn.Parameter(torch.ones(3).half())
    masters = Masters([p])
    for saved in (None, []):
        masters.of[p].zero_()
        masters.load_state_dict(saved)
        assert torch.equal(masters.of[p], torch.ones(3))
    masters.load_state_dict([torch.full((3,), 1 + 1e-5)])
    assert torch.equal(masters.state_dict()[0], torch.full((3,), 1 + 1e-5))


def test_an_autoencoder_that_overflows_float16_runs_in_float32(tmp_path):
    """SDXL's configuration says so (force_upcast), and the embedded model's; one that does not stays in float16."""
    source = Path(load_model("tiny").source.path)
    shutil.copytree(source, tmp_path / "own")
    config = tmp_path / "own" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))
    found = {where: load_model(where, dtype=torch.float16) for where in ("tiny", tmp_path / "own")}
    assert [m.vae.dtype for m in found.values()] == [torch.float32, torch.float16]
    assert found["tiny"].unet.conv_in.weight.dtype == torch.float16
    assert load_model("tiny", dtype=torch.bfloat16).vae.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dreambooth", "custom_diffusion", "dreambooth_lora"])
def test_the_prior_may_be_the_models_own_prediction(models, method):
    """The gradients are compared in float32, and so is what the frozen model predicts there."""
    model = models[torch.float16]
    events = []
    settings = LITTLE | dict(prior="own", prior_weight=1.0, steps=2, check_backend=True)
    trainer(model, method, **settings).train(on_event=events.append)
    assert sum(e.kind == "proof" for e in events) == 3 and events[-1].kind == "done"
