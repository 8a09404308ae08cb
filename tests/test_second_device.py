"""Whole runs on a device that is not the CPU: every method and option, sampling, the concepts' algebra, the files."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from typing import get_type_hints

import concept_cases
import numpy as np
import pytest
import torch
from pcs_trainer import load_model
from pcs_trainer.concept.attach import differs
from pcs_trainer.concept.blending import blend
from pcs_trainer.concept.compression import compress
from pcs_trainer.concept.formats.reading import import_concept
from pcs_trainer.concept.formats.writing import FORMATS, export
from pcs_trainer.concept.loading import load_concept
from pcs_trainer.concept.merging import merge
from pcs_trainer.evaluation.image_encoders import JudgeEncoder
from pcs_trainer.evaluation.scores import evaluate
from pcs_trainer.methods import method_named
from pcs_trainer.model.sources import TINY
from pcs_trainer.sampling import NAMES
from pcs_trainer.sampling.drawing import sample
from pcs_trainer.sampling.lag import Lag
from pcs_trainer.settings import Settings, literal_choices
from pcs_trainer.training.trainer import Trainer
from pcs_trainer.unet.unet import UNet
from PIL import Image
from safetensors.torch import load_file, save_file
from second_device import NAME, Second, calls, one_thread
from trainer_cases import METHODS, cache, pictures, small_for

import pcs_kernels

__all__ = ["cache", "one_thread"]

# One level with attention and one without: 300 operations a prediction, where the embedded model's have 1400.
SMALLER = {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "sample_size": 16,
    "norm_num_groups": 8,
}
SIZE = 32  # pixels: eight latents
RUN = dict(
    resolution=SIZE,
    steps=1,
    batch=1,
    bank=2,
    prior_images=1,
    prior_steps=1,
    learning_rate=1e-2,
    probe_every=0,
    token="<mug>",
)
# Together they reach every option that touches tensors; each goes to the methods that have it.
AFTER = dict(snr_gamma=5.0, timesteps="snr", optimizer="adamw", step_in_backward=False, plan="B", clip_norm=0.1)
INSIDE = dict(
    step_in_backward=True,
    clip="two_pass",
    clip_norm=0.1,
    accumulate=2,
    prior_weight=1.0,
    plan="C",
    train_token=True,
    train_text_encoder=True,
)


def variants(method):
    """Each value but the default of what a method alone lets choose from; an up-scaler's stage needs another UNet."""
    settings = method_named(method).settings
    common = {field.name for field in fields(Settings)}
    hints = get_type_hints(settings)
    return [
        {field.name: choice}
        for field in fields(settings)
        if field.name not in common | {"stage"}
        for choice in literal_choices(hints[field.name]) or ((not field.default,) if hints[field.name] is bool else ())
        if choice not in (field.default, None)
    ]


VARIANTS = [
    pytest.param(method, variant, id=f"{method}-{variant}") for method in METHODS for variant in variants(method)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded model with a smaller UNet of random weights."""
    root = tmp_path_factory.mktemp("model") / "small"
    shutil.copytree(TINY, root)
    file = root / "unet" / "config.json"
    config = json.loads(file.read_text()) | SMALLER
    file.write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = UNet.from_config(config).state_dict()
    save_file(
        {n: torch.randn_like(w) * 0.1 + (n.endswith("norm.weight") or ".norm" in n) for n, w in weights.items()},
        root / "unet" / "diffusion_pytorch_model.safetensors",
    )
    return root


@pytest.fixture(scope="module")
def model(folder):
    """It on the second device, in float32."""
    return load_model(folder, torch.float32, device=NAME)


@pytest.fixture(scope="module")
def halved(folder):
    """It on the second device, in bfloat16."""
    return load_model(folder, torch.bfloat16, device=NAME)


@pytest.fixture(scope="module")
def twin(folder):
    """The same model on the CPU: what makes concepts by hand and what results are compared with."""
    return load_model(folder, torch.float32)


def trainer(model, method, out=None, images=None, **options):
    given = small_for(method, **RUN | options)
    return Trainer(model, method, images or pictures(), class_word="mug", out=out, **given)


def of_cpu(concept):
    """A concept whose tensors are all on the CPU, finite."""
    tensors = [*concept.tensors.values(), *(r for rows in concept.words.values() for r in rows)]
    assert tensors and not any(isinstance(t, Second) for t in tensors)
    assert all(bool(torch.isfinite(t).all()) for t in tensors)
    return concept


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A folder of photos with masks beside them."""
    root = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(root / f"{i}.png")
        mask = np.zeros(pixels.shape[:2], np.uint8)
        mask[8:-8, 8:-8] = 255
        Image.fromarray(mask).save(root / f"{i}-mask.png")
    return root


# ---- the device itself


def refused(call, match="same device"):
    with pytest.raises(RuntimeError, match=match):
        call()


def test_the_device_refuses_what_a_gpu_refuses():
    x = torch.randn(3, 4)
    d = x.to(NAME)
    index = torch.tensor([0, 2])
    assert d.device.type == NAME and torch.equal(d.cpu(), x) and type(d.cpu()) is torch.Tensor
    for mixed in (lambda: d + x, lambda: x + d, lambda: d @ x.T, lambda: torch.cat([d, x]), lambda: torch.equal(d, x)):
        refused(mixed)
    refused(lambda: x.add_(d))
    refused(lambda: torch.tensor(1.0).add_(d.sum()))
    refused(lambda: torch.where(d > 0, d, x))
    refused(lambda: x[index.to(NAME)])
    refused(lambda: torch.randn(3, device=NAME, generator=torch.Generator()), "generator")
    with pytest.raises(TypeError, match="float64"):
        d.double()
    with pytest.raises((RuntimeError, TypeError)):
        d.numpy()
    assert torch.equal((d * torch.tensor(2.0)).cpu(), 2 * x) and torch.equal(d[index].cpu(), x[index])
    assert d.tolist() == x.tolist() and float(d.sum()) == float(x.sum())


def test_gradients_on_the_device_are_the_cpus():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 2), torch.randn(3, 4)
    layer(x).square().sum().backward()
    expected = layer.weight.grad
    layer.zero_grad()
    layer.to(NAME)(x.to(NAME)).square().sum().backward()
    assert isinstance(layer.weight.grad, Second) and torch.equal(layer.weight.grad.cpu(), expected)


# ---- training


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_goes_on_from_its_checkpoint(model, masked, tmp_path, method):
    """In float32, on masked photos, the optimizer step after the backward; then from the file on, with previews."""
    calls.clear()
    trainer(model, method, tmp_path, masked, **AFTER, check_backend=True).train()
    assert calls, "the product's operations did not run on the device"
    of_cpu(trainer(model, method, tmp_path, masked, **AFTER | dict(steps=2), check_backend=False).train(resume=True))
    of_cpu(load_concept(tmp_path / "concept.safetensors", model))


def together(method):
    """Two subjects, or one where the method takes no more."""
    words = ("mug", "cat")[: 1 if method_named(method).one_subject(method_named(method).settings()) else 2]
    return [{"images": pictures(seed=61 + i), "class_word": w, "token": f"<{w}>"} for i, w in enumerate(words)]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_several_subjects_train_in_bfloat16_with_the_step_in_the_backward(halved, method):
    """With class images, micro-batches, a clip of two passes, learned words and, where it can be, the text encoder."""
    settings = small_for(method, **RUN | INSIDE)
    del settings["token"]
    events = []
    run = Trainer(halved, method, concepts=together(method), **settings, check_backend=False)
    of_cpu(run.train(on_event=events.append))
    assert [e.kind for e in events if e.kind in ("step", "done")] == ["step", "done"]


@pytest.mark.slow
@pytest.mark.parametrize("method, variant", VARIANTS)
def test_every_variant_of_a_method_trains(model, method, variant):
    of_cpu(trainer(model, method, **variant, check_backend=False).train())


@pytest.mark.slow
def test_the_probe_and_the_previews_run_on_the_device(model, tmp_path):
    events = []
    options = dict(probe_every=1, preview_every=1, preview_prompts=("a <mug> mug",), check_backend=False)
    trainer(model, "personalized_residuals", tmp_path, **options).train(on_event=events.append)
    assert {"probe", "preview"} <= {e.kind for e in events} and not [str(e) for e in events if e.kind == "warning"]


@pytest.mark.slow
def test_a_run_on_the_device_is_the_run_on_the_cpu(model, twin):
    """By the same operations, in the reference."""
    options = dict(snr_gamma=5.0, steps=2, check_backend=False)
    with pcs_kernels.backend("reference"):
        ours, theirs = (trainer(m, "personalized_residuals", **options).train() for m in (model, twin))
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-4, atol=1e-5)


# ---- sampling and evaluation


@pytest.fixture(scope="module")
def pair(twin):
    return concept_cases.residuals(twin), concept_cases.residuals(twin, seed=2).renamed("<other>")


@pytest.mark.slow
@pytest.mark.parametrize("sampler", NAMES)
def test_every_sampler_draws_two_concepts_with_lag(halved, pair, sampler):
    prompts = ["a <thing> cat and a <other> cat"]
    options = dict(steps=2, size=SIZE, sampler=sampler, return_maps=True, return_latents=True)
    images, maps, latents = sample(halved, prompts, pair, lag=Lag(soft=True), **options)
    assert len(images) == 1 and type(latents) is type(maps.mean) is torch.Tensor and maps.tokens


@pytest.mark.slow
def test_a_concept_for_each_image_in_one_batch(model, pair, twin):
    noise = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = ["a <thing> cat", "a <other> cat", "a cat"]
    options = dict(steps=2, size=SIZE, index=[0, 1, None], latents=noise, eta=0.5, return_latents=True)
    with pcs_kernels.backend("reference"):
        drawn = [sample(m, prompts, pair, **options)[1] for m in (model, twin)]
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_concept_is_evaluated(model, pair):
    found = evaluate(
        model, pair[0], pictures(), prompts=["a {} at night"], count=2, steps=1, guidance=1, eyes=JudgeEncoder()
    )
    assert found["parameters"] > 0


# ---- the concepts' algebra, and the files of other programs


MAKERS = {
    "residuals": concept_cases.residuals,
    "dreambooth_lora": concept_cases.dreambooth_lora,
    "textboost": concept_cases.textboost,
    "custom_diffusion": concept_cases.custom_diffusion,
    "dreambooth": concept_cases.dreambooth,
}


def same(ours, theirs):
    """Two concepts of one result, both on the CPU."""
    of_cpu(ours)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MAKERS)
def test_compressed_and_blended_on_the_device_is_as_on_the_cpu(model, twin, kind):
    concept = MAKERS[kind](twin)
    short = replace(concept, tensors=dict(list(concept.tensors.items())[:24]))
    ours, theirs = (compress(short, m, 0.5) for m in (model, twin))
    of_cpu(ours)
    for name, tensor in theirs.tensors.items():  # the signs of singular vectors are nobody's choice: compare products
        torch.testing.assert_close(ours.tensors[name].abs(), tensor.abs(), rtol=1e-3, atol=1e-4)
    other = replace(short, words={}, meta=short.meta | {"token": ""})
    same(blend([short, other], [0.5, 0.7], model), blend([short, other], [0.5, 0.7], twin))


def test_concepts_merge_on_the_device_as_on_the_cpu(model, twin):
    concepts = [concept_cases.custom_diffusion(twin), concept_cases.custom_diffusion(twin, 7).renamed("<other>")]
    ours, theirs = (merge(concepts, m, ["a dog on a hill", "a red car in the snow"]) for m in (model, twin))
    same(ours, theirs)
    assert ours.constraint_residual < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_exported_from_the_device_is_what_the_cpu_exports(model, twin, tmp_path, kind, format):
    concept = MAKERS[kind](twin)
    for name, m in (("ours", model), ("theirs", twin)):
        export(concept, tmp_path / name, format, m)
    files = sorted(f.relative_to(tmp_path / "theirs") for f in (tmp_path / "theirs").rglob("*.safetensors"))
    assert files
    for file in files:
        ours, theirs = (load_file(tmp_path / name / file) for name in ("ours", "theirs"))
        assert ours.keys() == theirs.keys()
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)
    if format == "kohya" and concept.tensors:
        again = import_concept(tmp_path / "ours" / str(files[0]), model)
        assert differs(model, of_cpu(again))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_concept_changes_a_prediction_on_the_device(model, twin, kind):
    assert differs(model, MAKERS[kind](twin))
