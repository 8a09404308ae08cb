"""Exported files, loaded by diffusers itself: its text states and predictions are ours."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from concept_cases import (
    RANKS,
    assert_same,
    custom_diffusion,
    dreambooth,
    dreambooth_lora,
    low_rank,
    ours,
    peer_pipeline,
    prompts,
    residuals,
    textboost,
    theirs,
    word_rows,
)
from pcs_trainer import load_model
from pcs_trainer.concept.attach import attached
from pcs_trainer.concept.compression import compress
from pcs_trainer.concept.concept import Concept
from pcs_trainer.concept.formats.writing import export
from safetensors import safe_open
from unet_families import FAMILIES, ours_like, peer, peer_prediction, relative
from unet_families import inputs as inputs_of


def header_of(file) -> dict[str, str]:
    with safe_open(str(file), "pt") as opened:
        return opened.metadata() or {}


def keys_of(file) -> set[str]:
    with safe_open(str(file), "pt") as opened:
        return set(opened.keys())


def assert_covered(concept: Concept, report) -> None:
    """Every tensor and word is written or skipped with a reason, never both, and the files are there."""
    everything = set(concept.tensors) | {f"word.{e}.{w}" for w, rows in concept.words.items() for e in range(len(rows))}
    assert set(report.written) | set(report.skipped) == everything
    assert not set(report.written) & set(report.skipped)
    assert report.files and all(file.is_file() for file in report.files)
    assert str(report).startswith(report.format)


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_residuals_of_mixed_ranks(model, pipe, tmp_path, format, with_model):
    concept = residuals(model)
    assert {len(d) for d, _ in concept.pairs().values()} == set(RANKS.values())
    report = export(concept, tmp_path, format, model if with_model else None)
    assert_covered(concept, report)
    if format == "diffusers":
        pipe.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
        pipe.load_textual_inversion(str(tmp_path))
    else:
        pipe.load_lora_weights(str(tmp_path), weight_name="thing.safetensors")
        pipe.load_textual_inversion(str(tmp_path / "embeddings" / "v-thing.safetensors"), token="<thing>")
    said = prompts("<thing>")
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("rank", [4, None])
def test_lora_on_attention_and_text(model, pipe, tmp_path, format, rank):
    concept = dreambooth_lora(model, rank=rank)
    report = export(concept, tmp_path, format, model)
    assert_covered(concept, report)
    pipe.load_lora_weights(str(tmp_path))
    said = prompts("sks")
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_textboost_exports_what_the_format_can_carry(model, pipe, tmp_path, format):
    concept = textboost(model)
    stem = "text_encoder.text_model.encoder.layers.0.mlp.fc2"
    concept.tensors |= {f"{stem}.causal_down": torch.ones(1, 384), f"{stem}.causal_up": torch.ones(128, 1)}
    report = export(concept, tmp_path, format, model)
    assert_covered(concept, report)
    assert set(report.skipped) == {f"{stem}.causal_down", f"{stem}.causal_up"}
    assert "learned word on" in report.skipped[f"{stem}.causal_up"] and "first token" in report.notes[0]
    for name in report.skipped:
        del concept.tensors[name]
    if format == "diffusers":
        pipe.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
        pipe.load_textual_inversion(str(tmp_path))
        pipe.load_textual_inversion(str(tmp_path / "learned_embeds_far-away.safetensors"))
    else:
        pipe.load_lora_weights(str(tmp_path), weight_name="thing.safetensors")
        pipe.load_textual_inversion(str(tmp_path / "embeddings" / "v-thing.safetensors"), token="<thing>")
        pipe.load_textual_inversion(str(tmp_path / "embeddings" / "v-far-away.safetensors"), token="<far-away>")
    said = ["a <far-away> photo of a <thing> cat", "<thing> at night"]
    expected = ours(model, [concept], said)
    assert_same(expected, theirs(model, pipe, said), ours(model, [], said))
    held = ours(model, [concept], said, hold_first=True)[0]
    assert torch.equal(held[:, 1:], expected[0][:, 1:]) and not torch.equal(held[:, 0], expected[0][:, 0])


CROSSATTN = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("layers", [("to_k.weight", "to_v.weight"), CROSSATTN])
def test_custom_diffusion(model, pipe, tmp_path, layers, with_model):
    concept = custom_diffusion(model, layers=layers)
    report = export(concept, tmp_path, "diffusers", model if with_model else None)
    assert_covered(concept, report)
    pipe.unet.load_attn_procs(str(tmp_path), weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=pipe)
    pipe.load_textual_inversion(str(tmp_path))
    said = prompts("<thing>")
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))


def test_custom_diffusion_lacking_layers_is_filled_from_the_base(model, pipe, tmp_path):
    concept = custom_diffusion(model)
    first = next(iter(concept.tensors))
    change = concept.tensors.pop(first) - dict(model.unet.named_parameters())[first.removeprefix("unet.")].detach()
    with pytest.raises(ValueError, match="give the base model"):
        export(concept, tmp_path)
    second = next(iter(concept.tensors))
    del concept.tensors[second]  # one block as a whole
    concept.tensors[f"{first}.diff"] = change
    report = export(concept, tmp_path, model=model)
    assert_covered(concept, report)
    pipe.unet.load_attn_procs(str(tmp_path), weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=pipe)
    pipe.load_textual_inversion(str(tmp_path))
    said = prompts("<thing>")
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))


@pytest.mark.parametrize("layer", ["to_q", "to_out.0"])
def test_a_lora_beside_whole_values_in_one_attention_needs_a_pipeline(model, tmp_path, layer):
    """diffusers' Custom Diffusion processor replaces the attention's projections, which a LoRA then would not reach."""
    concept = custom_diffusion(model)
    stem = next(iter(concept.tensors)).rpartition(".attn2.")[0] + f".attn2.{layer}"
    weight = dict(model.unet.named_parameters())[f"{stem.removeprefix('unet.')}.weight"]
    concept.tensors |= {f"{stem}.down": torch.ones(1, weight.shape[1]), f"{stem}.up": torch.ones(weight.shape[0], 1)}
    with pytest.raises(ValueError, match="goes into a whole pipeline's weights"):
        export(concept, tmp_path)


def test_compressed_custom_diffusion_as_kohya(model, pipe, tmp_path):
    concept = compress(custom_diffusion(model), model, 0.6)
    assert len({len(d) for d, _ in concept.pairs().values()}) > 1
    assert_covered(concept, export(concept, tmp_path, "kohya", model))
    pipe.load_lora_weights(str(tmp_path), weight_name="thing.safetensors")
    pipe.load_textual_inversion(str(tmp_path / "embeddings" / "v-thing.safetensors"), token="<thing>")
    said = prompts("<thing>")
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))


def test_whole_values_as_kohya_differences(model, tmp_path):
    concept = custom_diffusion(model, layers=CROSSATTN)
    with pytest.raises(ValueError, match="give the base model"):
        export(concept, tmp_path, "kohya")
    assert not list(tmp_path.iterdir())
    report = export(concept, tmp_path, "kohya", model)
    assert_covered(concept, report)
    base = dict(model.unet.named_parameters())
    with safe_open(str(tmp_path / "thing.safetensors"), "pt") as opened:
        for name, value in concept.tensors.items():
            parameter = name.removeprefix("unet.")
            module, _, kind = parameter.rpartition(".")
            flat = f"lora_unet_{module.replace('.', '_')}.{'diff' if kind == 'weight' else 'diff_b'}"
            assert report.written[name] == f"thing.safetensors: {flat}"
            assert torch.allclose(opened.get_tensor(flat) + base[parameter], value, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("make", [residuals, dreambooth_lora, textboost, custom_diffusion, dreambooth])
def test_whole_pipeline(model, tmp_path, make):
    concept = make(model)
    report = export(concept, tmp_path / "whole", "pipeline", model)
    assert_covered(concept, report)
    said = prompts(concept.token)
    expected, base = ours(model, [concept], said), ours(model, [], said)
    assert_same(expected, theirs(model, peer_pipeline(tmp_path / "whole"), said), base)
    words = "_name_or_path", str(tmp_path), "tiny/weights"
    for file in (tmp_path / "whole").rglob("*.json"):
        assert not any(word in file.read_text() for word in words), file
    assert not list(tmp_path.glob(".whole*"))


@pytest.mark.slow
def test_our_own_loader_reads_the_pipeline_we_write(model, tmp_path):
    concept = dreambooth(model)
    report = export(concept, tmp_path / "db", "diffusers", model)
    assert "whole pipeline" in report.notes[0]
    again = load_model(tmp_path / "db")
    said = prompts("sks")
    assert_same(ours(model, [concept], said), ours(again, [], said), ours(model, [], said))


def test_pipeline_replaces_its_own_export_and_nothing_else(model, tmp_path):
    concept = residuals(model)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="holds other files"):
        export(concept, tmp_path / "mine", "pipeline", model)
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["model_index.json"]
    export(concept, tmp_path / "new", "pipeline", model, metadata=False)
    (tmp_path / "new" / "later.txt").write_text("x")
    export(concept, tmp_path / "new", "pipeline", model)
    assert not (tmp_path / "new" / "later.txt").exists() and (tmp_path / "new" / "unet").is_dir()
    with pytest.raises(ValueError, match="give the base model"):
        export(concept, tmp_path / "other", "pipeline")


def test_a_word_the_model_knows_is_refused_for_a_pipeline(model, tmp_path):
    concept = residuals(model)
    known = next(t for t in model.tokenizer.get_vocab() if len(t) == 3 and t.isalpha())
    concept = concept.renamed(known)
    with pytest.raises(ValueError, match="a token of the base model already"):
        export(concept, tmp_path / "x", "pipeline", model)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_header(model, tmp_path, format):
    concept = residuals(model)
    concept.meta |= {"learning_rate": "0.001", "date": "2026-01-02", "resolution": "64x64", "title": "A thing"}
    report = export(concept, tmp_path / "with", format, model)
    fields = header_of(report.files[0])
    assert fields["modelspec.sai_model_spec"] == "1.0.1" and fields["modelspec.architecture"].endswith("/lora")
    assert fields["modelspec.trigger_phrase"] == "<thing> cat" and fields["modelspec.prediction_type"] == "v"
    assert fields["modelspec.hash_sha256"].startswith("0x") and len(fields["modelspec.hash_sha256"]) == 66
    expected = {"modelspec.title", "modelspec.resolution", "modelspec.date", "modelspec.implementation"}
    expected |= {f"ss_{n}" for n in ("base_model_version", "network_module", "network_dim", "network_alpha")}
    expected |= {"ss_learning_rate", "ss_steps", "ss_seed"}
    assert expected <= fields.keys()
    bare = header_of(export(concept, tmp_path / "without", format, model, metadata=False).files[0])
    assert set(bare) <= {"format", "lora_adapter_metadata"}
    if format == "diffusers":
        adapter = json.loads(bare["lora_adapter_metadata"])
        assert adapter["unet.rank_pattern"] == adapter["unet.alpha_pattern"] != {}


def test_kohya_writes_an_alpha_equal_to_the_rank_of_every_module(model, tmp_path):
    concept = residuals(model)
    export(concept, tmp_path, "kohya", model)
    with safe_open(str(tmp_path / "thing.safetensors"), "pt") as opened:
        downs = [k for k in opened.keys() if k.endswith(".lora_down.weight")]  # noqa: SIM118
        assert len(downs) == len(concept.pairs())
        for key in downs:
            down = opened.get_tensor(key)
            assert down.dim() == 4  # a 1x1 convolution here
            assert float(opened.get_tensor(key.replace("lora_down.weight", "alpha"))) == down.shape[0]


def test_words_bundled_into_the_lora_file(model, tmp_path):
    concept = residuals(model)
    export(concept, tmp_path, "kohya", model, bundle=True)
    with safe_open(str(tmp_path / "thing.safetensors"), "pt") as opened:
        assert torch.equal(opened.get_tensor("bundle_emb.v-thing.string_to_param.*"), concept.words["<thing>"][0])


def test_two_words_of_one_file_name_are_said(model, tmp_path):
    concept = residuals(model)
    concept.words |= {"(far)": word_rows(model, 1, 1), "<far>": word_rows(model, 1, 2)}
    with pytest.raises(ValueError, match=r"make one file name, learned_embeds_far\.safetensors"):
        export(concept, tmp_path, "diffusers", model)


def test_what_cannot_be_exported_is_said(model, tmp_path):
    concept = residuals(model)
    with pytest.raises(ValueError, match="the formats are diffusers, kohya, pipeline"):
        export(concept, tmp_path, "ckpt", model)
    concept.tensors["unet.mid_block.attentions.0.proj_out.up"] = torch.ones(5, 7)
    with pytest.raises(ValueError, match="no projection"):
        export(concept, tmp_path, "kohya", model)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_other_families(tmp_path, family, format):
    """Linear projections, and for SDXL the names of Stability's own network, by diffusers' loader of that family."""
    import diffusers

    network = peer(FAMILIES[family])
    model = SimpleNamespace(unet=ours_like(network), text_encoders=[], schedule=SimpleNamespace(prediction="epsilon"))
    ends = ("proj_in", "proj_out", "attn2.to_k", "ff.net.2", "attn1.to_out.0")
    concept = Concept("lora", low_rank(model, ends, seed=3, rank=4), {}, {"title": "x"})
    report = export(concept, tmp_path, format, model)
    assert_covered(concept, report)
    given = inputs_of(FAMILIES[family])
    with torch.no_grad():
        base = peer_prediction(network, *given)
        x, t, text, added = given
        with attached(model, [concept]):
            expected = model.unet(x, t, model.unet.text_kv(text), added)
        kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
        options = {"unet_config": network.config} if family == "sdxl" else {}
        state, alphas, *_ = kind.lora_state_dict(str(report.files[0]), **options)
        network.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
        actual = peer_prediction(network, *given)
    assert relative(actual, expected) < 1e-4 and relative(base, expected) > 1e-2
    if (family, format) == ("sdxl", "kohya"):
        stability = ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")
        assert all(key.startswith(stability) for key in keys_of(report.files[0]))


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_words_of_two_encoders(tmp_path, format):
    rows = [torch.randn(2, 768), torch.randn(2, 1280)]
    concept = Concept("textual_inversion", {}, {"<thing>": rows}, {"token": "<thing>", "family": "sdxl"})
    report = export(concept, tmp_path, format)
    assert_covered(concept, report)
    with safe_open(str(report.files[0]), "pt") as opened:
        assert torch.equal(opened.get_tensor("clip_l"), rows[0]) and torch.equal(opened.get_tensor("clip_g"), rows[1])
