"""kohya's files as their readers take them: one tensor a weight, known names alone, ranks and families told."""

from __future__ import annotations

import pytest
import torch
from concept_cases import assert_same, custom_diffusion, dreambooth, ours, prompts, residuals, textboost, theirs
from pcs_trainer.concept.blending import blend
from pcs_trainer.concept.formats.kohya import NOT_READ
from pcs_trainer.concept.formats.reading import import_concept
from pcs_trainer.concept.formats.writing import export
from pcs_trainer.files import read_header, read_safetensors
from test_export import assert_covered


def lora_on_custom_diffusion(model):
    """A concept with whole values of which some have a pair too, as blending the two methods makes it."""
    values, pairs = custom_diffusion(model), residuals(model)
    pairs.words.clear()
    for name in [name for name in values.tensors if name.endswith("attn2.to_k.weight")]:
        rows, columns = values.tensors[name].shape
        stem = name.removesuffix(".weight")
        pairs.tensors |= {f"{stem}.down": 0.1 * torch.randn(2, columns), f"{stem}.up": 0.3 * torch.randn(rows, 2)}
    return blend([values, pairs], [0.6, 0.8], model)


def layers_of(tensors, *endings):
    return {name.removesuffix(end) for name in tensors for end in endings if name.endswith(end)}


def test_a_weight_has_a_pair_or_a_difference_and_never_both(model, tmp_path):
    concept = lora_on_custom_diffusion(model)
    report = export(concept, tmp_path, "kohya", model)
    assert_covered(concept, report)
    tensors, _ = read_safetensors(report.files[0])
    differences, pairs = layers_of(tensors, ".diff"), layers_of(tensors, ".lora_up.weight")
    assert differences and pairs and not differences & pairs
    again = import_concept(report.files[0], model)
    again.words = concept.words
    said = prompts("<thing>")
    assert_same(ours(model, [concept], said), ours(model, [again], said), ours(model, [], said))


def test_layers_of_a_text_encoder_that_nobody_reads_are_left_out_and_said(model, tmp_path):
    concept = dreambooth(model)
    report = export(concept, tmp_path, "kohya", model)
    assert_covered(concept, report)
    tensors, _ = read_safetensors(report.files[0])
    text = {name for name in tensors if name.startswith("lora_te_")}
    assert text and not any("norm" in name or "embedding" in name for name in text)
    left_out = {name for name in concept.tensors if "text_model" in name and ("norm" in name or "embedding" in name)}
    assert {name for name, why in report.skipped.items() if why == NOT_READ} == left_out
    assert len(left_out) == 3 * 4 + 2 + 2  # two norms a layer of weight and bias, the last one, two tables
    assert "a whole pipeline holds it" in str(report)


@pytest.mark.parametrize("make", [residuals, textboost])
def test_pairs_of_one_rank(model, pipe, tmp_path, make):
    concept = make(model)
    report = export(concept, tmp_path, "kohya", model, same_rank=True)
    assert_covered(concept, report)
    assert not any("several ranks" in note for note in report.notes)
    tensors, _ = read_safetensors(report.files[0])
    assert len({len(t) for name, t in tensors.items() if name.endswith("lora_down.weight")}) == 1
    again = import_concept(report.files[0], model)
    again.words = concept.words
    said = prompts("<thing>")
    assert_same(ours(model, [concept], said), ours(model, [again], said), ours(model, [], said))
    pipe.load_lora_weights(str(report.files[0]))
    for file in sorted((tmp_path / "embeddings").iterdir()):
        pipe.load_textual_inversion(str(file), token=f"<{file.stem.removeprefix('v-')}>")
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))


def test_several_ranks_are_said(model, tmp_path):
    assert any("several ranks" in note for note in export(residuals(model), tmp_path, "kohya", model).notes)


def test_a_word_that_is_too_long_for_a_file_s_name_is_cut_there_and_said(model, tmp_path):
    concept, long = residuals(model), "<" + "x" * 300 + ">"
    concept.words, concept.meta["token"] = {long: concept.words["<thing>"]}, long
    report = export(concept, tmp_path, "kohya", model)
    assert [len(file.stem) for file in report.files] == [100, 102]
    assert any(f"the word {long} is called v-{'x' * 100} there" in note for note in report.notes)


def test_the_header_tells_the_family_and_the_kind(model, tmp_path):
    concept = residuals(model)
    concept.meta["family"] = "sd2"
    report = export(concept, tmp_path / "a", "kohya", model)
    fields = [read_header(file) for file in report.files]
    assert [f["modelspec.architecture"].rpartition("/")[2] for f in fields] == ["lora", "textual-inversion"]
    assert all(f["ss_v2"] == "True" for f in fields)
    whole = export(custom_diffusion(model), tmp_path / "b", "kohya", model)
    fields = [read_header(file) for file in whole.files]
    assert fields[0]["modelspec.architecture"] == "stable-diffusion-v1/lora" and "ss_v2" not in fields[0]
    pipeline = export(custom_diffusion(model), tmp_path / "c", "pipeline", model)
    assert '"stable-diffusion-v1"' in next(f for f in pipeline.files if f.name == "modelspec.json").read_text()
