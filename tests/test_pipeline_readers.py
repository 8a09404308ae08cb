"""Whole pipelines, read by other programs than this one: transformers 4, and loaders that know checkpoint names alone.

PCS_OLD_TRANSFORMERS names a folder with an older transformers and diffusers in it, made by `pip install --no-deps
--target FOLDER "transformers==4.54.*" "tokenizers<0.22" "huggingface_hub<1" "diffusers==0.32.1"`. CI makes one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from concept_cases import assert_same, ours, peer_pipeline, prompts, residuals, theirs
from pcs_trainer import load_model
from pcs_trainer.concept.concept import Concept
from pcs_trainer.concept.formats.writing import export
from pcs_trainer.model.sources import TINY
from pcs_trainer.model.text import encode
from safetensors import safe_open
from test_model_loading import text_config, write_model

OLD = os.environ.get("PCS_OLD_TRANSFORMERS", "")
READ = """
import sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
folder, kind, prompts = sys.argv[1], sys.argv[2], sys.argv[3:]
pipe = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}[kind].from_pretrained(folder)
torch.save(pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0],
           folder + "/states.pt")
"""
needs_old = pytest.mark.skipif(not OLD, reason="PCS_OLD_TRANSFORMERS names no folder with transformers 4")


def test_ci_runs_these_tests_with_an_older_transformers():
    """Without the folder they are skipped: everywhere, were it not for this job."""
    job = (Path(__file__).parents[1] / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    job = job.partition("transformers-4:")[2]
    assert "PCS_OLD_TRANSFORMERS=" in job and Path(__file__).name in job and "--target" in job
    pins = re.findall(r'"[a-z_]+[=<][^"]+"', __doc__ or "")
    assert len(pins) == 4 and all(pin in job for pin in pins)


def names_of(file: Path) -> set[str]:
    with safe_open(str(file), "pt") as opened:
        return set(opened.keys())


def states_of_transformers_4(folder: Path, kind: str, said: list[str]) -> torch.Tensor:
    environment = os.environ | {"PYTHONPATH": OLD, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", READ, str(folder), kind, *said], check=True, env=environment)
    return torch.load(folder / "states.pt", weights_only=True)


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """A random SDXL of two encoders, a whole folder."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    root = write_model(tmp_path_factory.mktemp("model") / "xl", "sdxl")
    half = text_config()
    half.hidden_size = 12
    CLIPTextModel(half).save_pretrained(root / "text_encoder")
    CLIPTextModelWithProjection(half).save_pretrained(root / "text_encoder_2")
    return load_model(root)


def test_a_pipeline_has_the_names_of_checkpoint_files(model, xl, tmp_path):
    export(residuals(model), tmp_path / "sd", "pipeline", model)
    original = names_of(TINY / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in original)
    assert names_of(tmp_path / "sd" / "text_encoder" / "model.safetensors") == original
    rows = [torch.randn(1, 12), torch.randn(1, 12)]
    export(Concept("textual_inversion", {}, {"<v>": rows}, {"token": "<v>"}), tmp_path / "xl", "pipeline", xl)
    for part, extra in (("text_encoder", set()), ("text_encoder_2", {"text_projection.weight"})):
        found = names_of(tmp_path / "xl" / part / "model.safetensors")
        assert extra <= found and all(name.startswith("text_model.") for name in found - extra)


def test_a_pipelines_tokenizer_needs_no_tokenizer_json(model, tmp_path):
    from transformers import CLIPTokenizer

    export(residuals(model), tmp_path / "sd", "pipeline", model)
    folder = tmp_path / "sd" / "tokenizer"
    whole = CLIPTokenizer.from_pretrained(str(folder))
    (folder / "tokenizer.json").unlink()
    plain = CLIPTokenizer.from_pretrained(str(folder))
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == json.loads(
        (TINY / "tokenizer" / "vocab.json").read_text(encoding="utf-8")
    )
    for text in ("a <thing> cat on a table", "<thing>, red", "garden chair"):
        assert plain(text).input_ids == whole(text).input_ids
    assert plain.convert_tokens_to_ids("<thing>") == len(whole) - 1


@needs_old
@pytest.mark.slow
def test_transformers_4_reads_the_embedded_model(model, tmp_path):
    code = "import sys, torch; from pcs_trainer import load_model; from pcs_trainer.model.text import encode; "
    code += "torch.save(encode(load_model('tiny'), ['a mug']).states, sys.argv[1])"
    file = tmp_path / "states.pt"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([OLD, *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, env=environment)
    assert torch.allclose(torch.load(file, weights_only=True), encode(model, ["a mug"]).states, atol=1e-5)


@needs_old
@pytest.mark.slow
def test_transformers_4_reads_a_pipeline(model, xl, tmp_path):
    concept, said = residuals(model), prompts("<thing>")
    export(concept, tmp_path / "sd", "pipeline", model)
    expected = ours(model, [concept], said)[0]
    assert torch.allclose(states_of_transformers_4(tmp_path / "sd", "sd", said), expected, atol=1e-5)
    rows = [torch.randn(1, 12), torch.randn(1, 12)]
    concept, said = Concept("textual_inversion", {}, {"<v>": rows}, {"token": "<v>"}), ["a <v> b", "<v>"]
    export(concept, tmp_path / "xl", "pipeline", xl)
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "xl"))
    expected = pipe.encode_prompt(said, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    assert torch.allclose(states_of_transformers_4(tmp_path / "xl", "xl", said), expected, atol=1e-5)


def test_words_beside_an_unchanged_token_table(model, tmp_path):
    concept, folder = residuals(model), tmp_path / "sd"
    report = export(concept, folder, "pipeline", model, word_files=True)
    assert report.written["word.0.<thing>"] == "v-thing.safetensors: emb_params"
    assert folder / "embeddings" / "v-thing.safetensors" in report.files
    with safe_open(str(folder / "text_encoder" / "model.safetensors"), "pt") as opened:
        table = opened.get_tensor("text_model.embeddings.token_embedding.weight")
    assert len(table) == len(model.text_encoder.get_input_embeddings().weight)
    pipe = peer_pipeline(folder)
    pipe.load_textual_inversion(str(folder / "embeddings" / "v-thing.safetensors"), token="<thing>")
    said = prompts("<thing>")
    assert not any("token table" in note for note in report.notes)
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))


def test_who_opens_a_pipeline_with_a_word_is_said(model, tmp_path):
    report = export(residuals(model), tmp_path / "a", "pipeline", model)
    assert any("ComfyUI and stable-diffusion.cpp do not" in note for note in report.notes)
    assert not any("inside longer words" in note for note in report.notes)
    report = export(residuals(model).renamed("mugz"), tmp_path / "b", "pipeline", model)
    assert any("mugz is found inside longer words" in note for note in report.notes)
