"""Concepts on a device that is not the CPU: sampling, evaluation, their algebra, the files of other programs."""

from __future__ import annotations

from dataclasses import replace

import concept_cases
import pytest
import torch
from pcs_trainer.concept.attach import differs
from pcs_trainer.concept.blending import blend
from pcs_trainer.concept.compression import compress
from pcs_trainer.concept.formats.reading import import_concept
from pcs_trainer.concept.formats.writing import FORMATS, export
from pcs_trainer.concept.merging import merge
from pcs_trainer.evaluation.image_encoders import JudgeEncoder
from pcs_trainer.evaluation.scores import evaluate
from pcs_trainer.sampling import NAMES
from pcs_trainer.sampling.drawing import sample
from pcs_trainer.sampling.lag import Lag
from safetensors.torch import load_file
from second_device import SIZE, folder, halved, model, of_cpu, one_thread, twin
from trainer_cases import pictures

import pcs_kernels

__all__ = ["folder", "halved", "model", "one_thread", "twin"]


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
    of_cpu(ours)
    # Two captions leave most directions of the text to the ridge: what rounding moves there is large in single weights.
    for name, tensor in theirs.tensors.items():
        assert (ours.tensors[name] - tensor).norm() < 0.02 * tensor.norm(), name
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
        assert differs(model, of_cpu(again), "again")


@pytest.mark.parametrize("kind", MAKERS)
def test_a_concept_changes_a_prediction_on_the_device(model, twin, kind):
    assert differs(model, MAKERS[kind](twin), kind)
