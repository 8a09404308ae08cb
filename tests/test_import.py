"""Files that diffusers, PEFT and kohya's tools write, as concepts that do on ours what they do there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from concept_cases import (
    assert_same,
    custom_diffusion,
    dreambooth_lora,
    ours,
    prompts,
    residuals,
    textboost,
    theirs,
    word_rows,
)
from pcs_trainer.concept.formats.layer_names import LayerNames, stability_name
from pcs_trainer.concept.formats.reading import import_concept
from pcs_trainer.concept.formats.recognizing import module_name
from pcs_trainer.concept.formats.writing import export
from pcs_trainer.unet.unet import UNet
from safetensors.torch import load_file, save_file
from unet_families import SDXL_REAL, relative

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def trained_by_peft(pipe, targets, text_targets=None, **options):
    """Adapters as PEFT makes them, with both halves drawn at random."""
    from peft import LoraConfig

    parts = [(pipe.unet, targets)] + ([(pipe.text_encoder, text_targets)] if text_targets else [])
    for network, names in parts:
        network.add_adapter(LoraConfig(r=4, target_modules=names, **options))
        for name, p in network.named_parameters():
            if "lora_" in name:
                p.data = 0.15 * torch.randn_like(p)


def saved_by_diffusers(pipe, folder, with_metadata=True, convert=None):
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    unet = get_peft_model_state_dict(pipe.unet)
    has_text = hasattr(pipe.text_encoder, "peft_config")
    text = get_peft_model_state_dict(pipe.text_encoder) if has_text else None
    if convert:
        unet, text = convert(unet), convert(text) if text else None
    modules = {"unet": pipe.unet} | ({"text_encoder": pipe.text_encoder} if has_text else {})
    metadata = _collate_lora_metadata(modules) if with_metadata else {}
    StableDiffusionPipeline.save_lora_weights(folder, unet, text, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.slow
def test_lora_saved_by_diffusers_with_other_alphas(model, pipe, tmp_path):
    options = {"lora_alpha": 6, "rank_pattern": {"to_k": 7}, "alpha_pattern": {"to_k": 3, "q_proj": 10}}
    trained_by_peft(pipe, [*ATTENTION, "proj_out"], ["q_proj", "fc1"], **options)
    concept = import_concept(saved_by_diffusers(pipe, tmp_path), model, token="sks")
    assert concept.method == "lora" and concept.token == "sks"
    said = prompts("sks")
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))


def test_rank_stabilised_lora(model, pipe, tmp_path):
    trained_by_peft(pipe, ATTENTION, lora_alpha=2, use_rslora=True)
    concept = import_concept(saved_by_diffusers(pipe, tmp_path), model)
    said = prompts("sks")
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))


def test_lora_of_older_names(model, pipe, tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers

    trained_by_peft(pipe, ATTENTION, ["q_proj", "out_proj"], lora_alpha=4)
    file = saved_by_diffusers(pipe, tmp_path, with_metadata=False, convert=convert_state_dict_to_diffusers)
    assert any(".lora.down." in key or "lora_linear_layer.down" in key for key in load_file(file))
    concept = import_concept(file, model)
    said = prompts("sks")
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))


def test_names_of_attention_processors():
    before = "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert module_name(f"unet.{before}.processor.to_out") == f"unet.{before}.to_out.0"
    assert module_name(f"{before}.processor.to_q") == f"{before}.to_q"
    old = "text_encoder.text_model.encoder.layers.0.self_attn"
    assert module_name(f"{old}.to_out") == f"{old}.out_proj"


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets", [["conv1", "conv2", "conv_shortcut", "time_emb_proj"], ["conv", "conv_in", "proj_in"]]
)
def test_lora_on_convolutions_becomes_a_difference(model, pipe, tmp_path, targets):
    trained_by_peft(pipe, targets, lora_alpha=2)
    concept = import_concept(saved_by_diffusers(pipe, tmp_path), model)
    assert any(name.endswith(".diff") for name in concept.tensors)
    assert all(t.dim() == 4 for name, t in concept.tensors.items() if name.endswith(".diff"))
    said = prompts("sks")
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))


@pytest.mark.slow
def test_kohya_file_converted_by_diffusers(model, pipe, tmp_path):
    from diffusers.training_utils import _collate_lora_metadata  # noqa: F401
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    trained_by_peft(pipe, [*ATTENTION, "proj_out"], ["q_proj", "fc2"], lora_alpha=4, rank_pattern={"proj_out": 3})
    dotted = {f"unet.{k}": v for k, v in get_peft_model_state_dict(pipe.unet).items()}
    text = get_peft_model_state_dict(pipe.text_encoder)
    dotted |= {f"text_encoder.text_model.{k}": v for k, v in text.items()}
    kohya = convert_state_dict_to_kohya(dotted)
    assert all(key.startswith(("lora_unet_", "lora_te1_")) for key in kohya)
    for key in [k for k in kohya if k.endswith(".alpha")]:
        kohya[key] = torch.tensor(4.0)
    save_file({k: v.contiguous() for k, v in kohya.items()}, tmp_path / "k.safetensors")
    concept = import_concept(tmp_path / "k.safetensors", model)
    said = prompts("sks")
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))


def test_kohya_alpha_is_folded_and_differences_are_read(model, tmp_path):
    base = dict(model.unet.named_parameters())
    module = "down_blocks.1.attentions.0.proj_out"
    flat, conv = "lora_unet_down_blocks_1_attentions_0_proj_out", "lora_unet_mid_block_resnets_0_conv1"
    down, up = torch.randn(4, 96, 1, 1), torch.randn(96, 4, 1, 1)
    small = {
        "lora_down": torch.randn(2, 128, 1, 1),
        "lora_mid": torch.randn(2, 2, 3, 3),
        "lora_up": torch.randn(128, 2, 1, 1),
    }
    tensors = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.0)}
    tensors |= {f"{conv}.{name}.weight": t for name, t in small.items()}
    tensors["lora_unet_conv_out.diff"], tensors["lora_unet_conv_out.diff_b"] = torch.ones(8, 64, 3, 3), torch.ones(8)
    save_file(tensors, tmp_path / "k.safetensors")
    concept = import_concept(tmp_path / "k.safetensors", model)
    assert torch.allclose(concept.tensors[f"unet.{module}.up"], up.flatten(1) / 4)
    assert torch.equal(concept.tensors["unet.conv_out.bias.diff"], torch.ones(8))
    change = concept.tensors["unet.mid_block.resnets.0.conv1.weight.diff"]
    x = torch.randn(1, 128, 6, 6)
    stepwise = torch.nn.functional.conv2d(x, small["lora_down"])
    stepwise = torch.nn.functional.conv2d(torch.nn.functional.conv2d(stepwise, small["lora_mid"]), small["lora_up"])
    assert change.shape == base["mid_block.resnets.0.conv1.weight"].shape
    assert relative(torch.nn.functional.conv2d(x, change), stepwise) < 1e-5


@pytest.mark.parametrize("safe", [True, False])
def test_custom_diffusion_saved_by_diffusers(model, pipe, tmp_path, safe):
    export(custom_diffusion(model), tmp_path / "a", "diffusers", model)
    name = "pytorch_custom_diffusion_weights.safetensors"
    pipe.unet.load_attn_procs(str(tmp_path / "a"), weight_name=name, _pipeline=pipe)
    rows = word_rows(model, 1, 9)[0]
    pipe.load_textual_inversion({"<new1>": rows[0]})
    folder = tmp_path / "b"
    pipe.unet.save_attn_procs(str(folder), safe_serialization=safe)
    torch.save({"<new1>": rows[0]}, folder / "<new1>.bin")
    concept = import_concept(folder, model)
    assert concept.method == "custom_diffusion" and concept.token == "<new1>"
    said = prompts("<new1>")
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))


def embedding_files(rows, folder) -> dict[str, str]:
    """The forms of textual inversions in the wild -> the word that each names."""
    torch.save({"<new>": rows[0]}, folder / "learned_embeds.bin")
    save_file({"<new>": rows}, folder / "learned_embeds.safetensors")
    save_file({"emb_params": rows}, folder / "newone.safetensors")
    records = {"name": "named", "step": 4, "string_to_token": {"*": 265}, "string_to_param": {"*": rows}}
    torch.save(records | {"sd_checkpoint": None}, folder / "webui.pt")
    torch.save(rows, folder / "bare.pt")
    words = {"learned_embeds.bin": "<new>", "learned_embeds.safetensors": "<new>", "newone.safetensors": "newone"}
    return words | {"webui.pt": "named", "bare.pt": "bare"}


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, "<mine>"])
def test_textual_inversions(model, pipe, tmp_path, token):
    rows = word_rows(model, 2, 9)[0]
    pipe.load_textual_inversion(rows, token=token or "<new>")
    for file, word in embedding_files(rows, tmp_path).items():
        concept = import_concept(tmp_path / file, model, token)
        assert concept.method == "textual_inversion" and concept.token == (token or word)
        assert list(concept.words) == [concept.token]
        expected = rows[:1] if file == "learned_embeds.bin" else rows
        assert torch.equal(concept.words[concept.token][0], expected)
        if len(expected) == 2:
            concept = concept.renamed(token or "<new>")
            said = prompts(concept.token)
            assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], ["a cat", "x"]))


@pytest.mark.slow
@pytest.mark.parametrize("make", [residuals, dreambooth_lora, textboost, custom_diffusion])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_our_exports_come_back(model, tmp_path, make, format):
    concept = make(model)
    export(concept, tmp_path, format, model)
    again = import_concept(tmp_path, model)
    assert again.token == concept.token and again.class_word == concept.class_word
    assert again.meta["steps"] == "12" and again.meta["seed"] == "3"
    mains = {w: rows for w, rows in again.words.items() if w == concept.token}
    assert {w for w in concept.words if w == concept.token} == set(mains)
    again.words = {**again.words, **concept.words}
    said = prompts(concept.token)
    assert_same(ours(model, [concept], said), ours(model, [again], said), ours(model, [], said))


def test_our_own_file_is_taken_too(model, tmp_path):
    concept = residuals(model)
    file = concept.save(tmp_path / "c.safetensors")
    assert import_concept(file, model, token="<other>").token == "<other>"


def test_sdxl_names_agree_with_diffusers():
    from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers

    unet = UNet.from_config(SDXL_REAL, device="meta")
    fake = SimpleNamespace(unet=unet, text_encoders=[torch.nn.Module(), torch.nn.Module()])
    layers = LayerNames(fake)
    modules = {n.rpartition(".")[0] for n, p in unet.named_parameters() if p.dim() > 1}
    keys = {f"lora_unet_{stability_name(m, unet.settings).replace('.', '_')}.lora_down.weight": m for m in modules}
    assert len(keys) == len(modules)
    settings = SimpleNamespace(layers_per_block=2)
    checked = 0
    for key, module in keys.items():
        assert layers.find(key.removesuffix(".lora_down.weight")) == ("unet", module)
        mapped = next(iter(_maybe_map_sgm_blocks_to_diffusers({key: 1}, settings)))
        theirs = _convert_unet_lora_key(mapped).removesuffix(".down.weight")
        theirs = module_name(theirs.removesuffix(".lora").removesuffix("_lora"))
        if theirs.count(".") == module.count("."):  # diffusers leaves some dots in names of feed-forward layers
            assert theirs == module
            checked += 1
    assert checked > 0.8 * len(modules)
