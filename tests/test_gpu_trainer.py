"""The trainer on a GPU, on the embedded model: what people run first. Skipped without a GPU or without diffusers."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from pcs_trainer import load_model, sample
from pcs_trainer.methods import TITLES
from trainer_cases import cache as cache
from trainer_cases import small_for, trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
DEVICE = "cuda"


@pytest.fixture(scope="module")
def on_gpu():
    return load_model("tiny", torch.bfloat16, DEVICE)


@pytest.fixture(scope="module")
def exact_on_gpu():
    return load_model("tiny", torch.float32, DEVICE)


def losses(events):
    return [e.data["loss"] for e in events if e.kind == "step"]


def finite(concept):
    return all(bool(torch.isfinite(t).all()) for t in concept.tensors.values())


@pytest.mark.parametrize("method", TITLES)
def test_every_method_trains_and_its_gradients_are_the_references(on_gpu, tmp_path, method):
    events = []
    concept = trainer(on_gpu, method, tmp_path, steps=22, check_backend=True).train(on_event=events.append)
    proofs = " ".join(e.data["text"] for e in events if e.kind == "proof")
    assert "gradients agree" in proofs and "have moved" in proofs and "the file" in proofs
    assert len(losses(events)) == 22 and finite(concept)


@pytest.mark.parametrize("method", ("personalized_residuals", "dreambooth", "textboost"))
def test_a_resumed_run_is_the_same_run(exact_on_gpu, tmp_path, method):
    """As far as the order of cuDNN's sums allows, which is not promised from call to call."""
    whole = trainer(exact_on_gpu, method, steps=4).train()
    trainer(exact_on_gpu, method, tmp_path, steps=2).train()
    resumed = trainer(exact_on_gpu, method, tmp_path, steps=4).train(resume=True)
    assert whole.tensors.keys() == resumed.tensors.keys()
    for name, tensor in whole.tensors.items():
        distance = float((tensor.float() - resumed.tensors[name].float()).norm())
        assert distance <= 1e-2 * float(tensor.float().norm()), name


@pytest.mark.parametrize("proof", (True, False))
def test_dreambooth_with_its_step_in_the_backward(on_gpu, proof):
    events = []
    settings = dict(steps=4, check_backend=proof, **small_for("dreambooth", step_in_backward=True))
    assert finite(trainer(on_gpu, "dreambooth", **settings).train(on_event=events.append))
    assert any("gradients agree" in e.data["text"] for e in events if e.kind == "proof") == proof


def test_dreambooths_step_in_the_backward_is_the_step_behind_it(exact_on_gpu):
    settings = dict(steps=2, clip_norm=0.0, learning_rate=1e-5)
    inside, behind = (
        trainer(exact_on_gpu, "dreambooth", step_in_backward=b, **settings).train().tensors for b in (True, False)
    )
    for name, tensor in inside.items():  # a step is 1e-5 at most, and Adam's first ones are of that size
        assert float((tensor.float() - behind[name].float()).abs().max()) <= 5e-5, name


def test_pictures_are_those_of_the_cpu(exact_on_gpu):
    """float32, whose convolutions cuDNN multiplies with ten bits; noise is drawn on the CPU for every device."""
    options = dict(steps=6, seed=3, guidance=3.0)
    there, here = (
        np.asarray(sample(m, "a red mug in a meadow", **options)[0], dtype=np.float32) / 255
        for m in (exact_on_gpu, load_model("tiny", torch.float32))
    )
    assert np.abs(there - here).mean() < 0.02


def test_lag_masks_on_the_gpu(on_gpu):
    concept = trainer(on_gpu, steps=6, learning_rate=0.05).train()
    prompt, options = "a photo of <mug> mug on the beach", dict(steps=4, seed=1)
    masked, whole, base = (
        np.asarray(sample(on_gpu, prompt if c else "a photo of a mug on the beach", c, lag=lag, **options)[0])
        for c, lag in (([concept], True), ([concept], False), ([], False))
    )
    assert masked.std() > 0 and not np.array_equal(masked, whole) and not np.array_equal(masked, base)


def test_a_concept_of_the_gpu_samples_on_the_cpu(on_gpu, tmp_path):
    concept = trainer(on_gpu, out=tmp_path, steps=2).train()
    assert all(t.device.type == "cpu" for t in concept.tensors.values())
    assert sample(load_model("tiny"), "a photo of <mug> mug", [concept], steps=2)[0].size == (64, 64)
