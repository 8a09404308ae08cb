"""PEFT's folders and LyCORIS's kinds of adapters, imported: predictions are those of the program that wrote them."""

from __future__ import annotations

import json
import time

import pytest
import torch
from concept_cases import assert_same, ours, prompts, residuals, theirs, word_rows
from pcs_trainer import load_model
from pcs_trainer.cli.commands.common import concept_file, open_concept
from pcs_trainer.concept.attach import predict
from pcs_trainer.concept.formats.reading import import_concept
from pcs_trainer.concept.formats.writing import export
from pcs_trainer.errors import UsageError
from safetensors.torch import load_file, save_file
from test_model_loading import text_config, write_model
from unet_families import relative

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
PROJECTION = "lora_unet_mid_block_attentions_0_proj_out"
CONV = "mid_block.resnets.0.conv1"


def trained(network, config, folder) -> None:
    """An adapter of PEFT's on a network, drawn at random, and its folder."""
    from peft import get_peft_model

    wrapped = get_peft_model(network, config)
    size = 0.1 if config.peft_type.value == "LORA" else 0.3  # a change of the base's own size; LoHa multiplies four
    for name, p in network.named_parameters():
        if p.requires_grad and "magnitude" not in name:
            p.data = size * torch.randn_like(p)
        elif p.requires_grad:
            p.data = p.data * (1 + 0.1 * torch.rand_like(p))
    wrapped.save_pretrained(str(folder))


def configs():
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    patterns = {"rank_pattern": {"to_k": 6}, "alpha_pattern": {r".*attn2\.to_k": 3.0, "to_k": 5.0, "to_out.0": 30.0}}
    return {
        "alpha": LoraConfig(r=8, lora_alpha=32, target_modules=ATTENTION),
        "rslora": LoraConfig(r=8, lora_alpha=6, use_rslora=True, target_modules=ATTENTION),
        "patterns": LoraConfig(r=8, lora_alpha=32, target_modules=ATTENTION, **patterns),
        "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=[*ATTENTION, "conv1", "proj_in"]),
        "loha": LoHaConfig(r=4, alpha=8, target_modules=[*ATTENTION, "conv1"]),
        "loha tucker": LoHaConfig(r=4, alpha=8, use_effective_conv2d=True, target_modules=[*ATTENTION, "conv1"]),
        "lokr": LoKrConfig(r=4, alpha=8, target_modules=[*ATTENTION, "conv2"]),
        "lokr whole": LoKrConfig(r=64, alpha=8, decompose_factor=4, target_modules=ATTENTION),
        "lokr both": LoKrConfig(r=2, alpha=4, decompose_both=True, use_effective_conv2d=True, target_modules=["conv2"]),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["alpha", "rslora", "patterns", "dora", "loha", "loha tucker", "lokr", "lokr whole", "lokr both"]
)
def test_a_folder_of_pefts(model, pipe, tmp_path, kind):
    trained(pipe.unet, configs()[kind], tmp_path)
    concept = import_concept(tmp_path, model)
    assert not concept.meta.get("left_out")
    said = prompts("sks")
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))
    file = import_concept(tmp_path / "adapter_model.safetensors", model)
    assert all(torch.equal(file.tensors[name], t) for name, t in concept.tensors.items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
def test_pefts_folders_of_two_networks(model, pipe, tmp_path):
    from peft import LoraConfig

    trained(pipe.unet, LoraConfig(r=8, lora_alpha=32, target_modules=ATTENTION), tmp_path / "unet")
    trained(pipe.text_encoder, LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj"]), tmp_path / "text_encoder")
    concept = import_concept(tmp_path, model)
    assert {slot.part for slot in concept.residuals()} == {"unet", "text_encoder"}
    said = prompts("sks")
    assert_same(ours(model, [concept], said), theirs(model, pipe, said), ours(model, [], said))
    assert concept_file(tmp_path) == tmp_path  # the commands take the folder too
    opened = open_concept(tmp_path, model)
    assert opened.tensors.keys() == concept.tensors.keys()
    alone = import_concept(tmp_path / "text_encoder", model)
    assert {slot.part for slot in alone.residuals()} == {"text_encoder"}


BAD_CONFIGS = [
    ('{"lora_alpha": "x"}', "lora_alpha is 'x'; expected a number"),
    ('{"lora_alpha": 1e999}', "lora_alpha is 'inf'; expected a number"),
    ('{"lora_alpha": 4, "alpha_pattern": [1]}', "alpha_pattern is"),
    ('{"lora_alpha": 4, "alpha_pattern": {"to_k": [4]}}', "expected a number"),
    ('{"lora_alpha": 4, "alpha_pattern": {"(to_k": 4}}', "search for it might not end"),
    ('{"lora_alpha": 4, "alpha_pattern": {"([a-z0-9_.]+)+!": 4}}', "search for it might not end"),
    ('{"lora_alpha": 4, "alpha_pattern": {"(.|.)(.|.)(.|.)x": 4}}', "search for it might not end"),
    ('{"lora_alpha": 4, "alpha_pattern": {"[z-a]": 4}}', "expected a regular expression"),
    (json.dumps({"alpha_pattern": {f"a.*{i}": 1 for i in range(99)}}), "more than 16 regular expressions"),
    ("[" * 100_000, "cannot be read"),
    ("{", "cannot be read"),
    ('{"peft_type": "OFT"}', "an adapter of the kind 'OFT'"),
]


@pytest.mark.parametrize(("text", "said"), BAD_CONFIGS)
def test_a_bad_scale_is_one_sentence(model, tmp_path, text, said):
    pair = {"lora_B": torch.ones(128, 2), "lora_A": torch.ones(2, 128)}
    names = {f"base_model.model.mid_block.attentions.0.proj_out.{half}.weight": t for half, t in pair.items()}
    save_file(names, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        import_concept(tmp_path, model)
    assert "\n" not in str(caught.value) and "adapter_config.json" in str(caught.value)
    dotted = {f"unet.{name.removeprefix('base_model.model.')}": t for name, t in names.items()}
    by_part = text.replace('"lora_alpha"', '"unet.lora_alpha"').replace('"alpha_pattern"', '"unet.alpha_pattern"')
    save_file(dotted, tmp_path / "f.safetensors", {"lora_adapter_metadata": by_part})
    if "peft_type" not in text:
        with pytest.raises(ValueError, match=said) as caught:
            import_concept(tmp_path / "f.safetensors", model)
        assert "\n" not in str(caught.value)


def test_the_slowest_expression_that_is_read_ends_soon():
    from pcs_trainer.concept.formats.scales import _pattern

    slowest = [_pattern(key, "") for key in ("[a-z0-9_.]*[a-z0-9_.]*Z", ".*(.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.)Z")]
    name, start = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0" * 2, time.perf_counter()
    assert not any(pattern.matches(name) for pattern in slowest for _ in range(20))
    assert time.perf_counter() - start < 5  # 40 of them; a search without a bound would not end


@pytest.mark.parametrize("by_column", [False, True])
def test_doras_magnitudes_by_lycoris(model, tmp_path, by_column):
    """m (W + d) / |W + d| over rows [O, 1], or as LyCORIS's older files have it over columns [1, I]."""
    weight = model.unet.state_dict()["mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"].float()
    down, up = torch.randn(3, weight.shape[1]), torch.randn(weight.shape[0], 3)
    magnitude = torch.rand(1, weight.shape[1]) if by_column else torch.rand(weight.shape[0], 1)
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(6.0)}
    save_file(tensors | {f"{stem}.dora_scale": magnitude}, tmp_path / "f.safetensors")
    concept = import_concept(tmp_path / "f.safetensors", model)
    tuned = weight + 2 * up @ down
    expected = tuned * magnitude / tuned.norm(dim=0 if by_column else 1, keepdim=True)
    (change,) = concept.tensors.values()
    assert relative(weight + change, expected) < 1e-5


def test_trained_norms_are_differences(model, tmp_path):
    stem = "lora_unet_mid_block_resnets_0_norm1"
    tensors = {f"{stem}.w_norm": torch.full((128,), 0.2), f"{stem}.b_norm": torch.full((128,), 0.1)}
    save_file(tensors, tmp_path / "f.safetensors")
    concept = import_concept(tmp_path / "f.safetensors", model)
    assert torch.equal(concept.tensors["unet.mid_block.resnets.0.norm1.weight.diff"], torch.full((128,), 0.2))
    assert torch.equal(concept.tensors["unet.mid_block.resnets.0.norm1.bias.diff"], torch.full((128,), 0.1))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{PROJECTION}.oft_blocks", "holds OFT or BOFT"),
        (f"{PROJECTION}.a1.weight", "holds GLoRA"),
        ("base_model.model.mid_block.attentions.0.proj_out.lora_E", "holds AdaLoRA"),
        ("unet:3:up", "cloneofsimo's LoRA"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_other_kinds_are_refused_by_name(model, tmp_path, name, said, force):
    pair = {f"{PROJECTION}.lora_up.weight": torch.ones(128, 2), f"{PROJECTION}.lora_down.weight": torch.ones(2, 128)}
    save_file(pair | {name: torch.ones(2, 4, 4)}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=said):
        import_concept(tmp_path / "f.safetensors", model, force=force)


@pytest.mark.parametrize(
    "renamed",
    [
        ("lora_unet_", "lycoris_"),
        ("lora_te_", "lycoris_"),
        ("unet.", "unet.base_model.model."),
        ("unet.", "base_model.model."),
        ("text_encoder.text_model.", "base_model.model.text_model."),
        ("text_encoder.text_model.", "text_encoders.clip_l.transformer.text_model."),
    ],
)
def test_names_that_other_tools_put_before_a_layers(model, tmp_path, renamed):
    concept = residuals(model)
    stem = "text_encoder.text_model.encoder.layers.0.mlp.fc2"
    concept.tensors |= {f"{stem}.down": torch.randn(2, 384), f"{stem}.up": torch.randn(128, 2)}
    concept.words.clear()
    old, new = renamed
    report = export(concept, tmp_path / "a", "kohya" if old.startswith("lora") else "diffusers", model)
    tensors = load_file(report.files[0])
    assert any(name.startswith(old) for name in tensors)
    other = {name.replace(old, new) if name.startswith(old) else name: t for name, t in tensors.items()}
    save_file(other, tmp_path / "f.safetensors")
    again = import_concept(tmp_path / "f.safetensors", model)
    assert again.tensors.keys() == concept.tensors.keys()


def test_loras_that_comfyui_saves(model, tmp_path):
    from pcs_trainer.concept.formats.layer_names import stability_name

    module = "up_blocks.1.attentions.0.proj_out"
    stem = f"diffusion_model.{stability_name(module, model.unet.settings)}"
    rows = model.unet.state_dict()[f"{module}.weight"].shape[0]
    tensors = {f"{stem}.lora_up.weight": torch.randn(rows, 2), f"{stem}.lora_down.weight": torch.randn(2, rows)}
    tensors[f"{stem}.diff_b"] = torch.ones(rows)
    save_file(tensors, tmp_path / "f.safetensors")
    concept = import_concept(tmp_path / "f.safetensors", model)
    assert set(concept.tensors) == {f"unet.{module}.{end}" for end in ("down", "up", "bias.diff")}


@pytest.mark.parametrize("compressed", [False, True])
def test_custom_diffusions_own_files(model, tmp_path, compressed):
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    weight = model.unet.state_dict()[name].float()
    u, v = torch.randn(len(weight), 2), torch.randn(2, weight.shape[1])
    row = word_rows(model, 1, 3)[0][0]
    value = {"u": u, "v": v} if compressed else weight + u @ v
    torch.save({"unet": {name: value}, "modifier_token": {"<new1>": row}}, tmp_path / "delta.bin")
    concept = import_concept(tmp_path / "delta.bin", model)
    assert concept.token == "<new1>" and torch.equal(concept.words["<new1>"][0], row[None])
    if compressed:
        assert torch.equal(concept.tensors[f"unet.{name.removesuffix('.weight')}.up"], u)
    else:
        assert torch.equal(concept.tensors[f"unet.{name}"], weight + u @ v)


@pytest.mark.slow
def test_a_word_of_two_encoders_in_two_files(tmp_path):
    """As diffusers' script for SDXL writes it; the encoders of this small SDXL are of two widths, as the real ones."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    root = write_model(tmp_path / "xl", "sdxl")
    for part, width, kind in (("text_encoder", 8, CLIPTextModel), ("text_encoder_2", 16, CLIPTextModelWithProjection)):
        config = text_config()
        config.hidden_size = width
        kind(config).save_pretrained(root / part)
        settings = root / part.replace("text_encoder", "tokenizer") / "tokenizer_config.json"
        longer = json.loads(settings.read_text()) | {"model_max_length": 40}  # room for a prompt spelled in letters
        settings.write_text(json.dumps(longer))
    model, folder = load_model(root), tmp_path / "word"
    rows = {"learned_embeds": torch.randn(2, 8), "learned_embeds_2": torch.randn(2, 16)}
    folder.mkdir()
    for file, values in rows.items():
        save_file({"<new>": values}, folder / f"{file}.safetensors")
    assert concept_file(folder) == folder
    for concept in (import_concept(folder, model), open_concept(folder, model)):
        assert concept.token == "<new>" and list(concept.words) == ["<new>"]
        assert all(torch.equal(a, b) for a, b in zip(concept.words["<new>"], rows.values(), strict=True))
    prompt = "a photo of a <new>"
    assert not torch.equal(predict(model, [concept], prompt), predict(model, [], prompt))
    (folder / "learned_embeds_2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'<new>' have shapes \[\[2, 8\]\]; this model's text width is \[8, 16\]"):
        import_concept(folder, model)


def test_a_folder_that_is_no_import_is_refused_by_the_commands(model, tmp_path):
    concept = residuals(model)
    for number in range(2):
        concept.save(tmp_path / "merged" / f"{number}.safetensors")
    assert concept_file(tmp_path / "merged") == tmp_path / "merged"
    with pytest.raises(ValueError, match=r"0\.safetensors is a whole concept, with other files beside it"):
        open_concept(tmp_path / "merged", model)
    (tmp_path / "merged" / "1.safetensors").unlink()
    assert open_concept(tmp_path / "merged", model).token == concept.token
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(UsageError, match="is a whole model and not a concept; give it as --model"):
        concept_file(tmp_path / "pipeline")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"has no concept\.safetensors, and no LoRA or embedding of another program"):
        concept_file(tmp_path / "empty")


def test_onetrainers_embeddings(model, tmp_path):
    rows = word_rows(model, 2, 3)[0]
    save_file({"emp_params": rows}, tmp_path / "newone.safetensors")
    concept = import_concept(tmp_path / "newone.safetensors", model)
    assert concept.token == "newone" and torch.equal(concept.words["newone"][0], rows)
