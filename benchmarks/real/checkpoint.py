"""Folders like SD1.5's and SDXL's in all but the weights' values: their configurations, shapes, CLIP's vocabulary.

The weights are random in bfloat16, spread so that activations keep their size: norm weights between 0.2 and 1 as in
trained networks, products at 0.7 of the size that keeps a variance. CLIP's 48,894 merges are part of open_clip_torch's
wheel, which pip fetches; nothing of it is run.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pcs_trainer.unet.unet import UNet
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.registry import SD15, SDXL

MERGES = 48_894  # of CLIP's vocabulary: 256 bytes, 256 at a word's end, these, and two special tokens
FIRST_TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49_408,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
SECOND_TEXT = FIRST_TEXT | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


@dataclass(frozen=True)
class Kind:
    """A model's configurations."""

    pipeline: str
    unet: dict[str, Any]
    texts: tuple[dict[str, Any], ...]
    vae: dict[str, Any]


KINDS = {
    "sd15": Kind(
        "StableDiffusionPipeline",
        UNET
        | SD15
        | {
            "sample_size": 64,
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        },
        (FIRST_TEXT,),
        {},
    ),
    "sdxl": Kind(
        "StableDiffusionXLPipeline",
        UNET | SDXL | {"sample_size": 128},
        (FIRST_TEXT, SECOND_TEXT),
        {"scaling_factor": 0.13025, "force_upcast": True, "sample_size": 1024},
    ),
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def make_checkpoint(folder: Path, merges: Path | None = None, kind: str = "sd15") -> Path:
    """The folder, made where it is not there yet: 2.1 GB in half a minute, of SDXL 6.9 GB.

    Args:
        folder: where it goes.
        merges: CLIP's `bpe_simple_vocab_16e6.txt.gz`; None fetches it.
        kind: "sd15" or "sdxl".
    """
    if (folder / "model_index.json").is_file():
        return folder
    chosen, words = KINDS[kind], clip_merges(merges)
    index: dict[str, Any] = {"_class_name": chosen.pipeline, "scheduler": ["diffusers", "PNDMScheduler"]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for part in ("unet", "vae", "scheduler"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(folder / "unet" / "config.json", chosen.unet)
    shapes = UNet.from_config(chosen.unet, device="meta").state_dict()
    save_file(spread(shapes, 0), folder / "unet" / "diffusion_pytorch_model.safetensors")
    write_autoencoder(folder / "vae", chosen.vae)
    for number, config in enumerate(chosen.texts):
        end = f"_{number + 1}" if number else ""
        write_text_encoder(folder / f"text_encoder{end}", config, 2 + number)
        write_tokenizer(folder / f"tokenizer{end}", words)
        index |= {f"text_encoder{end}": ["transformers", config["architectures"][0]]}
        index |= {f"tokenizer{end}": ["transformers", "CLIPTokenizer"]}
    if chosen.pipeline == "StableDiffusionPipeline":
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None]}
    _write_json(folder / "model_index.json", index)
    return folder


def write_autoencoder(folder: Path, more: dict[str, Any]) -> None:
    """An autoencoder of SD's widths."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        blocks = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **blocks, **more
        )
    vae.save_config(folder)
    save_file(spread(vae.state_dict(), 1), folder / "diffusion_pytorch_model.safetensors")


def write_text_encoder(folder: Path, config: dict[str, Any], seed: int) -> None:
    """A text encoder of CLIP's."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        encoder = getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))
    _write_json(folder / "config.json", config)
    named = {_checkpoint_name(name): value for name, value in encoder.state_dict().items()}
    named = {name: value for name, value in named.items() if value.is_floating_point()}
    save_file(spread(named, seed), folder / "model.safetensors")


def spread(shapes: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random bfloat16 weights of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        value = torch.empty(shape.shape, dtype=torch.bfloat16)
        if value.dim() == 1 and name.endswith("weight"):
            value.uniform_(0.2, 1.0, generator=generator)
        elif "embedding" in name and value.dim() == 2 and "time" not in name:
            value.normal_(0, 0.02, generator=generator)  # as CLIP's tables
        else:
            deviation = 0.02 if value.dim() == 1 else 0.7 * value[0].numel() ** -0.5
            value.normal_(0, deviation, generator=generator)
        found[name] = value
    return found


def _checkpoint_name(name: str) -> str:
    """transformers 5 leaves out the prefix that every file has."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def clip_merges(path: Path | None = None) -> list[str]:
    """CLIP's merges in their order."""
    if path is not None:
        text = gzip.decompress(path.read_bytes()).decode()
    else:
        with TemporaryDirectory() as folder:
            call = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "open_clip_torch", "-d", folder]
            subprocess.run(call, check=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                text = gzip.decompress(wheel.read("open_clip/bpe_simple_vocab_16e6.txt.gz")).decode()
    return text.split("\n")[1 : MERGES + 1]


def write_tokenizer(folder: Path, merges: list[str]) -> None:
    """CLIP's tokenizer as its checkpoints hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # The other bytes stand for themselves 256 places further on, so that every one is a visible character.
    others = [256 + i for i in range(256 - len(printable))]
    letters = [chr(c) for c in (*printable, *others)]
    words = [*letters, *(f"{c}</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    _write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "<|endoftext|>"
    settings = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", special)


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=1, ensure_ascii=False), encoding="utf-8")
