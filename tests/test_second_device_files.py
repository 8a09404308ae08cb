"""Other programs' files read on a device that is not the CPU, and the up-scaler's stage trained and drawn there."""

from __future__ import annotations

import json

import concept_cases
import numpy as np
import pytest
import torch
from pcs_trainer import load_concept, load_model, upscale
from pcs_trainer.concept.attach import differs, predict
from pcs_trainer.concept.formats.reading import import_concept
from pcs_trainer.concept.formats.writing import export
from pcs_trainer.model.autoencoder import encode_images
from pcs_trainer.training.trainer import Trainer
from PIL import Image
from safetensors.torch import save_file
from second_device import NAME, calls, folder, model, of_cpu, one_thread, twin
from trainer_cases import cache, pictures
from upscaler_cases import write_upscaler

__all__ = ["cache", "folder", "model", "one_thread", "twin"]

MAKERS = {
    "residuals": concept_cases.residuals,
    "dreambooth_lora": concept_cases.dreambooth_lora,
    "textboost": concept_cases.textboost,
    "custom_diffusion": concept_cases.custom_diffusion,
}
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
UP_SCALED = ("dreambooth", "dreambooth_lora", "lora_fa")
STEM = f"lora_unet_{LAYER.replace('.', '_')}"


def same(ours, theirs):
    """Two concepts of one file, read on both devices: all of it on the CPU, and equal."""
    of_cpu(ours)
    assert ours.tensors.keys() == theirs.tensors.keys() and ours.words.keys() == theirs.words.keys()
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-4, atol=1e-5)
    for word, rows in theirs.words.items():
        assert all(torch.equal(a, b) for a, b in zip(ours.words[word], rows, strict=True))


def read_on_both(where, model, twin):
    ours = import_concept(where, model)
    same(ours, import_concept(where, twin))
    assert not ours.meta.get("left_out")
    return ours


@pytest.mark.parametrize("kind", MAKERS)
def test_diffusers_files(model, twin, tmp_path, kind):
    """A LoRA of the UNet or of the text encoder, Custom Diffusion's file, and the word beside it."""
    made = MAKERS[kind](twin)
    export(made, tmp_path, "diffusers", twin)
    read = read_on_both(tmp_path, model, twin)
    assert read.tensors and read.words.keys() == made.words.keys()
    assert differs(model, read, kind)


@pytest.mark.parametrize("keys", [("<mug>",), ("emb_params",)], ids=["diffusers", "A1111"])
def test_an_embedding_of_two_vectors(model, twin, tmp_path, keys):
    (rows,) = concept_cases.word_rows(twin, 2, seed=3)
    save_file(dict.fromkeys(keys, rows), tmp_path / "mug.safetensors")
    read = read_on_both(tmp_path / "mug.safetensors", model, twin)
    (word,) = read.words
    assert torch.equal(read.words[word][0], rows) and differs(model, read, word)


def adapters(weight):
    """Keys and tensors of other kinds of adapter on one square projection, of a change about the base's size."""
    size = len(weight)
    a, b = 0.3 * torch.randn(size, 2), torch.randn(2, size)
    alpha = {"alpha": torch.tensor(2.0)}
    return {
        "dora": alpha | {"lora_up.weight": a, "lora_down.weight": b, "dora_scale": weight.norm(dim=1, keepdim=True)},
        "loha": alpha | {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a.flip(0), "hada_w2_b": b.flip(1)},
        "lokr": alpha | {"lokr_w1": torch.randn(4, 4), "lokr_w2": 0.3 * torch.randn(size // 4, size // 4)},
    }


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_other_kinds_of_adapter_become_differences(model, twin, tmp_path, kind):
    """DoRA's is computed with the base's weight, which is on the device."""
    torch.manual_seed(1)
    tensors = adapters(twin.unet.state_dict()[f"{LAYER}.weight"].float())[kind]
    save_file({f"{STEM}.{key}": t.contiguous() for key, t in tensors.items()}, tmp_path / "f.safetensors")
    assert differs(model, read_on_both(tmp_path / "f.safetensors", model, twin), kind)


@pytest.mark.slow
def test_a_folder_of_pefts(model, twin, tmp_path):
    width = len(twin.unet.state_dict()[f"{LAYER}.weight"])
    halves = {"lora_A": torch.randn(2, width), "lora_B": 0.3 * torch.randn(width, 2)}
    tensors = {f"base_model.model.{LAYER}.{half}.weight": t for half, t in halves.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert differs(model, read_on_both(tmp_path, model, twin), "peft")


def test_the_unet_waits_on_the_cpu_while_photos_are_encoded(model, twin, monkeypatch):
    """A GPU has SDXL's UNet or the autoencoder's work on its photos, and the UNet comes back as it was."""
    before, held = predict(model, [], "a mug").cpu(), []
    encode = model.vae.encode

    def watched(x):
        held.append(sum(p.numel() for p in model.unet.parameters()))
        return encode(x)

    monkeypatch.setattr(model.vae, "encode", watched)
    moments = encode_images(model, pictures(1))
    assert held == [0] and torch.allclose(moments.mean, encode_images(twin, pictures(1)).mean, atol=1e-5)
    assert torch.equal(predict(model, [], "a mug").cpu(), before)
    monkeypatch.setattr(model.vae, "encode", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode_images(model, pictures(1))
    assert torch.equal(predict(model, [], "a mug").cpu(), before)


@pytest.mark.slow
@pytest.mark.parametrize("method", UP_SCALED)
def test_an_up_scaler_trains_on_the_device_and_enlarges(tmp_path, method):
    """DreamBooth's super-resolution stage: the run, its file, and a picture drawn with it."""
    large = load_model(write_upscaler(tmp_path / "x4"), torch.float32, device=NAME)
    options = dict(stage="super_resolution", class_word="mug", steps=1, batch=1, learning_rate=1e-2, probe_every=0)
    calls.clear()
    Trainer(large, method, pictures(1), out=tmp_path / "run", **options, check_backend=False).train()
    assert calls, "the product's operations did not run on the device"
    concept = of_cpu(load_concept(tmp_path / "run" / "concept.safetensors"))
    small = [np.asarray(Image.fromarray(pixels).resize((16, 16))) for pixels in pictures(1)]
    (drawn,) = upscale(large, small, None, concept, steps=2, guidance=2)
    assert drawn.size == (64, 64)
