"""Concepts made of concepts, and files for other programs, by a model whose frozen weights are held in 8 bits."""

import pytest
import torch
from concept_cases import custom_diffusion, dreambooth_lora
from pcs_trainer import load_model
from pcs_trainer.concept.base_weights import BaseWeights
from pcs_trainer.concept.blending import blend
from pcs_trainer.concept.compression import compress
from pcs_trainer.concept.formats.pipeline import merged_pipeline
from pcs_trainer.concept.merging import merge
from pcs_trainer.unet.int8 import layers_for_8_bits


@pytest.fixture(scope="module")
def int8():
    return load_model("tiny", weights="int8")


def same(found, wanted):
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor), name


def test_the_algebra_of_concepts_reads_the_weights_of_the_file(int8, model):
    name = next(iter(layers_for_8_bits(int8.unet)))
    assert torch.equal(BaseWeights(int8).value(f"unet.{name}.weight"), model.unet.get_parameter(f"{name}.weight"))
    one, other = custom_diffusion(model), custom_diffusion(model, 8).renamed("<other>")
    same(compress(one, int8), compress(one, model))
    same(blend([one], [0.5], int8), blend([one], [0.5], model))
    same(merge([one, other], int8), merge([one, other], model))


@pytest.mark.parametrize("made", (custom_diffusion, dreambooth_lora))
def test_a_pipeline_has_the_weights_of_the_file_and_no_codes(int8, model, made):
    found, wanted = (merged_pipeline(made(model), m).unet.state_dict() for m in (int8, model))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_an_export_says_where_the_weights_of_8_bits_are_all_there_is(model, tmp_path):
    """As of a checkpoint in a single file, which is converted whole or not at all."""
    own = load_model("tiny", weights="int8")
    made = dreambooth_lora(model)
    assert not any("8 bits" in note for note in made.export(tmp_path / "one", "pipeline", model=own).notes)
    for layer in layers_for_8_bits(own.unet).values():
        layer.original = None
    assert any("8 bits" in note for note in made.export(tmp_path / "two", "pipeline", model=own).notes)
