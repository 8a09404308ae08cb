"""load_model on folders, files and hub names; broken models in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pcs_trainer import load_model
from pcs_trainer.errors import UnsupportedModel
from pcs_trainer.model.schedule import Schedule
from pcs_trainer.unet.config import checked_config
from safetensors.torch import load_file, save_file
from unet_families import FAMILIES, SD15_REAL, SD21_REAL, SDXL_REAL, inputs, peer, peer_prediction, relative

WEIGHTS = "diffusion_pytorch_model.safetensors"


def text_config():
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=300,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=20,
    )


def tokenizer_files(folder: Path) -> None:
    folder.mkdir()
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings |= {"pad_token": "<|endoftext|>", "model_max_length": 7, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(root: Path, family: str) -> Path:
    """A whole model in diffusers' layout, written by diffusers and transformers."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    peer(FAMILIES[family]).save_pretrained(root / "unet")
    CLIPTextModel(text_config()).save_pretrained(root / "text_encoder")
    tokenizer_files(root / "tokenizer")
    if family == "sdxl":
        CLIPTextModelWithProjection(text_config()).save_pretrained(root / "text_encoder_2")
        tokenizer_files(root / "tokenizer_2")
    AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(root / "vae")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(root / "scheduler")
    if FAMILIES[family]["in_channels"] == 7:
        DDPMScheduler().save_pretrained(root / "low_res_scheduler")
    name = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    (root / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "sd", "sd1")


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def same_prediction(model, expected) -> None:
    torch.manual_seed(3)
    call = inputs(FAMILIES["sd1"])
    with torch.no_grad():
        assert relative(model.unet(*call), expected(*call)) < 1e-5


@pytest.fixture(scope="module")
def expected(folder):
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel.from_pretrained(folder / "unet")
    return lambda *call: peer_prediction(network, *call)


def test_parts_load_when_used_and_no_sooner(folder, expected):
    model = load_model(folder)
    assert model.loaded == []
    same_prediction(model, expected)
    assert model.loaded == ["unet"]
    assert not any(p.requires_grad for p in model.unet.parameters())
    ids = model.tokenizer("a b", padding="max_length", return_tensors="pt").input_ids
    assert model.text_encoder(ids).last_hidden_state.shape == (1, 7, 24)
    assert model.vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mean.shape == (1, 4, 8, 8)
    assert len(model.schedule) == 1000
    model.release("vae", "text_encoders")
    assert sorted(model.loaded) == ["schedule", "tokenizers", "unet"]
    with pytest.raises(ValueError, match="'lungs' is not a part"):
        model.release("lungs")


def test_sdxl_has_two_text_sides(tmp_path):
    model = load_model(write_model(tmp_path / "xl", "sdxl"), dtype=torch.bfloat16)
    assert [type(m).__name__ for m in model.text_encoders] == ["CLIPTextModel", "CLIPTextModelWithProjection"]
    assert len(model.tokenizers) == 2
    assert model.unet.conv_in.weight.dtype is torch.bfloat16
    assert model.text_encoder.dtype is torch.bfloat16


def test_sharded_weights(copy, expected):
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel.from_pretrained(copy / "unet")
    shutil.rmtree(copy / "unet")
    network.save_pretrained(copy / "unet", max_shard_size="200KB")
    shards = sorted((copy / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    same_prediction(load_model(copy), expected)
    shards[1].unlink()
    with pytest.raises(UnsupportedModel, match=f"{shards[1].name} is missing, though .*index.json names it"):
        load_model(copy).unet  # noqa: B018


def test_fp16_variants_are_taken_by_16_bit_runs(copy):
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel.from_pretrained(copy / "unet")
    (copy / "unet" / WEIGHTS).unlink()
    network.half().save_pretrained(copy / "unet", variant="fp16")
    assert [p.name for p in (copy / "unet").glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    for dtype in (torch.bfloat16, torch.float32):
        unet = load_model(copy, dtype=dtype).unet
        assert {p.dtype for p in unet.parameters()} == {dtype}
        torch.testing.assert_close(unet.conv_in.weight, network.conv_in.weight.to(dtype))
    assert load_model(copy).unet.conv_in.weight.dtype is torch.float32  # a CPU has no float16 arithmetic


def test_the_old_names_of_a_vae(copy):
    file = copy / "vae" / WEIGHTS
    tensors = load_file(file)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {next((n.replace(a, b) for a, b in old.items() if a in n), n): t for n, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file)
    ours = load_model(copy).vae.state_dict()
    assert all(torch.equal(ours[name], t) for name, t in tensors.items())


def test_meta_device_reads_no_weights(copy):
    for file in copy.rglob("*.safetensors"):
        file.unlink()
    model = load_model(copy, device="meta")
    for part in (model.unet, model.vae, model.text_encoder):
        assert {p.device.type for p in part.parameters()} == {"meta"}


LDM = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
       "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip


def ldm_name(name: str) -> str:
    """The name a UNet tensor of a two-layers-a-level network has in a single-file checkpoint."""
    top = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
           "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
    for ours, theirs in top.items():
        if name.startswith(ours + "."):
            return "model.diffusion_model." + name.replace(ours, theirs)
    side, level, kind, i, *rest = name.split(".") if not name.startswith("mid") else ("mid", "0", *name.split(".")[1:])
    level, i, tail = int(level), int(i), ".".join(rest)
    if kind == "resnets":
        tail = ".".join([LDM[rest[0]], *rest[1:]])
    if side == "mid":
        block = f"middle_block.{1 if kind == 'attentions' else 2 * i}"
    elif kind == "downsamplers":
        block, tail = f"input_blocks.{3 * (level + 1)}.0", tail.replace("conv.", "op.")
    elif side == "down_blocks":
        block = f"input_blocks.{3 * level + i + 1}.{int(kind == 'attentions')}"
    elif kind == "upsamplers":
        block = f"output_blocks.{3 * level + 2}.{2 if level else 1}"
    else:
        block = f"output_blocks.{3 * level + i}.{int(kind == 'attentions')}"
    return f"model.diffusion_model.{block}.{tail}"


def test_a_single_file_goes_through_diffusers(copy, tmp_path, expected):
    tensors = {ldm_name(name): t for name, t in load_file(copy / "unet" / WEIGHTS).items()}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    same_prediction(load_model(file, config=copy), expected)
    model = load_model(file, config=copy)
    with pytest.raises(UnsupportedModel, match=r"diffusers cannot convert .*model.safetensors \(vae\)"):
        model.vae  # noqa: B018


def hub_cache(root: Path, folder: Path) -> None:
    """The folder as the hub's client caches it."""
    snapshot = root / "models--somebody--small" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (root / "models--somebody--small" / "refs").mkdir()
    (root / "models--somebody--small" / "refs" / "main").write_text("0" * 40)


def test_a_hub_name_uses_the_cache_and_says_what_is_missing(folder, tmp_path, monkeypatch, expected):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub_cache(tmp_path, folder)
    same_prediction(load_model("somebody/small"), expected)
    with pytest.raises(
        UnsupportedModel,
        match=r"somebody/other is not a folder, and neither the hub nor its cache has model_index.json",
    ):
        load_model("somebody/other")
    next(tmp_path.rglob("unet/*.safetensors")).unlink()
    with pytest.raises(UnsupportedModel, match="somebody/small has no unet/"):
        load_model("somebody/small").unet  # noqa: B018


def change(file: Path, edit) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


BROKEN = {
    "missing": (lambda t: t.pop("conv_in.bias"), r"lacks the tensor 'conv_in.bias'$"),
    "extra": (lambda t: t.update({"conv_in.twin": torch.ones(1)}), "has a tensor 'conv_in.twin' that this"),
    "misshapen": (
        lambda t: t.update({"conv_in.bias": torch.ones(5)}),
        r"tensor 'conv_in.bias' has shape \[5\]; the configuration makes it \[32\]",
    ),
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_a_wrong_tensor_is_named_with_its_file(copy, kind):
    edit, message = BROKEN[kind]
    change(copy / "unet" / WEIGHTS, edit)
    with pytest.raises(UnsupportedModel, match=message) as error:
        load_model(copy).unet  # noqa: B018
    assert str(copy / "unet" / WEIGHTS) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("left", [0, 5, 2000, -1])
def test_a_truncated_file_is_named(copy, part, left):
    file = next((copy / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UnsupportedModel, match=part) as error:
        getattr(load_model(copy), {"text_encoder": "text_encoders"}.get(part, part))
    assert "\n" not in str(error.value)


def test_text_encoder_with_a_missing_tensor(copy):
    file = copy / "text_encoder" / "model.safetensors"
    change(file, lambda t: t.pop(next(n for n in t if "layers.1.mlp.fc2.weight" in n)))
    with pytest.raises(UnsupportedModel, match=r"model.safetensors lacks the tensor '.*layers.1.mlp.fc2.weight'"):
        load_model(copy).text_encoders  # noqa: B018


def test_missing_pieces_and_other_families(copy, tmp_path):
    for where, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "has no folder 'unet'"),
        (copy / "model_index.json", "neither a folder nor a checkpoint"),
    ):
        with pytest.raises(UnsupportedModel, match=message):
            load_model(where)
    (copy / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UnsupportedModel, match=r"holds a FluxPipeline; supported are Stable Diffusion 1.x, 2.x and XL"):
        load_model(copy)
    (copy / "model_index.json").write_text("{")
    with pytest.raises(UnsupportedModel, match=r"model_index.json is invalid JSON"):
        load_model(copy)
    (copy / "model_index.json").unlink()
    file = copy / "unet" / WEIGHTS
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UnsupportedModel, match="is a pickle, which could run code"):
        load_model(copy).unet  # noqa: B018
    shutil.rmtree(copy / "vae")
    with pytest.raises(UnsupportedModel, match="has no folder 'vae'"):
        load_model(copy).vae  # noqa: B018


REFUSED = {
    "down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "class_embed_type": "projection",
    "act_fn": "gelu",
    "resnet_time_scale_shift": "scale_shift",
    "encoder_hid_dim": 8,
    "addition_embed_type": "image",
    "only_cross_attention": [True, False],
    "num_attention_heads": 4,
    "attention_head_dim": [4, 4],
    "cross_attention_dim": [24, 24, 48],
    "norm_num_groups": 7,
    "brand_new_switch": True,
    "_class_name": "UNetMotionModel",
}


@pytest.mark.parametrize("key", list(REFUSED))
def test_an_unsupported_configuration_value_is_refused_by_name(copy, key):
    file = copy / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: REFUSED[key]}))
    with pytest.raises(UnsupportedModel, match=rf"config.json: UNet configuration: {key} = ") as error:
        load_model(copy).unet  # noqa: B018
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("real", [SD15_REAL, SD21_REAL, SDXL_REAL])
def test_the_real_configurations_are_accepted(real):
    assert len(checked_config(real)["layers_per_block"]) in (3, 4)


@pytest.mark.parametrize("config", [
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    {"beta_schedule": "linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100, "prediction_type": "sample"},
])  # fmt: skip
def test_the_schedule_is_diffusers(config):
    from diffusers import DDPMScheduler

    theirs, ours = DDPMScheduler(**config), Schedule.from_config(config)
    torch.testing.assert_close(ours.abar, theirs.alphas_cumprod, rtol=1e-6, atol=1e-9)
    x, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 41, 90])
    noisy = ours.add_noise(x, noise, t)
    torch.testing.assert_close(noisy, theirs.add_noise(x, noise, t))
    target = ours.target(x, noise, t)
    if ours.prediction == "v_prediction":
        torch.testing.assert_close(target, theirs.get_velocity(x, noise, t))
    torch.testing.assert_close(ours.clean(noisy, target, t), x, rtol=1e-4, atol=1e-4)


def test_a_schedule_of_another_kind_is_refused():
    for key in ("beta_schedule", "prediction_type"):
        with pytest.raises(ValueError, match=f"schedule: {key} = 'odd'"):
            Schedule.from_config({key: "odd"})


def test_what_is_attached_to_an_encoder_is_kept_beside_it_and_ends_with_it(folder):
    import gc

    from pcs_trainer.model import text_adapters

    model = load_model(folder)
    encoder = model.text_encoder
    before, attributes = len(text_adapters._ADAPTERS), set(encoder.__dict__)
    text_adapters.adapters(encoder)
    assert set(encoder.__dict__) == attributes and len(text_adapters._ADAPTERS) == before + 1
    weight = text_adapters.token_table(encoder).weight
    norm = text_adapters.mean_row_norm(encoder)
    assert norm == pytest.approx(weight.norm(dim=1).mean().item())
    with torch.no_grad():
        weight.mul_(2)
    assert text_adapters.mean_row_norm(encoder) == pytest.approx(2 * norm)
    model.release("text_encoders")
    del encoder, weight
    gc.collect()
    assert len(text_adapters._ADAPTERS) == before
