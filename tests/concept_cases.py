"""Concepts of each method made by hand on the tiny model, and predictions of ours and of diffusers' to compare."""

from __future__ import annotations

import copy

import torch
from pcs_trainer.concept.attach import attached
from pcs_trainer.concept.concept import Concept
from pcs_trainer.model.fingerprint import fingerprint
from pcs_trainer.model.sources import TINY
from pcs_trainer.model.text import encode
from pcs_trainer.model.text_adapters import file_name
from unet_families import relative

RANKS = {64: 3, 96: 5, 128: 7}  # as Personalized Residuals has 16, 32 and 64: one for each width
LIMIT = 1e-4


def word_rows(model, count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for encoder in model.text_encoders:
        table = encoder.get_input_embeddings().weight.detach()
        rows.append(table[5] + torch.randn(count, table.shape[1], generator=generator) * table.std())
    return rows


def meta(token: str, class_word: str = "cat", **more: str) -> dict[str, str]:
    return {"token": token, "class_word": class_word, "family": "sd1", "steps": "12", "seed": "3", **more}


def pair(
    p: torch.Tensor, rank: int, generator: torch.Generator, size: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) whose product is `size` of the weight it is added to."""
    down = torch.randn(rank, p.shape[1], generator=generator)
    up = torch.randn(p.shape[0], rank, generator=generator)
    return down, up * float(size * p.norm() / (up @ down).norm())


def low_rank(model, ends: tuple[str, ...], part: str = "unet", seed: int = 0, rank: int | None = None) -> dict:
    generator = torch.Generator().manual_seed(seed)
    network = model.unet if part == "unet" else model.text_encoders[int(part.endswith("_2"))]
    tensors = {}
    for name, p in network.named_parameters():
        if name.endswith(tuple(f"{end}.weight" for end in ends)):
            module = name.removesuffix(".weight")
            stem = f"{part}.{module if part == 'unet' else file_name(module)}"
            down, up = pair(p.detach(), rank or RANKS.get(p.shape[0], 4), generator)
            tensors |= {f"{stem}.down": down, f"{stem}.up": up}
    assert tensors
    return tensors


def residuals(model, seed: int = 1) -> Concept:
    """Personalized Residuals with V*: pairs of mixed ranks on every proj_out."""
    words = {"<thing>": word_rows(model, 1, seed)}
    return Concept(
        "personalized_residuals", low_rank(model, ("proj_out",), seed=seed), words, meta("<thing>"), fingerprint(model)
    )


def dreambooth_lora(model, seed: int = 2, rank: int | None = 4) -> Concept:
    """Pairs on all attention projections and on the text encoder, and no learned word."""
    tensors = low_rank(model, ("to_q", "to_k", "to_v", "to_out.0"), seed=seed, rank=rank)
    tensors |= low_rank(model, ("q_proj", "v_proj", "out_proj"), "text_encoder", seed + 1, rank)
    return Concept("dreambooth_lora", tensors, {}, meta("sks"), fingerprint(model))


def textboost(model, seed: int = 4) -> Concept:
    """Pairs on the text encoder's attention and MLP, V* of two rows, an augmentation's word, the first token held."""
    ends = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    words = {"<thing>": word_rows(model, 2, seed), "<far-away>": word_rows(model, 1, seed + 1)}
    tensors = low_rank(model, ends, "text_encoder", seed, 4)
    return Concept("textboost", tensors, words, meta("<thing>", hold_first="1"), fingerprint(model))


def custom_diffusion(model, seed: int = 5, layers=("to_k.weight", "to_v.weight")) -> Concept:
    """Whole values in every attention over the text, and V*."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, p in model.unet.named_parameters():
        if ".attn2." in name and name.endswith(tuple(layers)):
            change = torch.randn(p.shape, generator=generator) * p.std().nan_to_num(0.1) * 0.3
            tensors[f"unet.{name}"] = p.detach() + change
    words = {"<thing>": word_rows(model, 1, seed)}
    return Concept("custom_diffusion", tensors, words, meta("<thing>"), fingerprint(model))


def dreambooth(model, seed: int = 6) -> Concept:
    """Every UNet and text tensor anew."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for part, network in (("unet", model.unet), ("text_encoder", model.text_encoder)):
        for name, p in network.named_parameters():
            full = f"{part}.{name if part == 'unet' else file_name(name)}"
            tensors[full] = p.detach() + torch.randn(p.shape, generator=generator) * p.detach().abs().mean() * 0.05
    return Concept("dreambooth", tensors, {}, meta("sks"), fingerprint(model))


def inputs(model) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(2, model.unet.settings["in_channels"], 16, 16, generator=generator), torch.tensor([220, 800])


def prompts(token: str) -> list[str]:
    return [f"a photo of a {token} cat on a table", f"{token} in the snow"]


@torch.no_grad()
def ours(model, concepts, said, hold_first: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(text states, prediction) with concepts on the model."""
    x, t = inputs(model)
    with attached(model, concepts) as words:
        states = encode(model, said, words, hold_first).states
        return states, model.unet(x, t, model.unet.text_kv(states))


def peer_pipeline(folder=TINY):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)


def fresh(pipe):
    """A pipeline of its own for a test that changes it."""
    from diffusers import StableDiffusionPipeline

    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


@torch.no_grad()
def theirs(model, pipe, said) -> tuple[torch.Tensor, torch.Tensor]:
    x, t = inputs(model)
    states = pipe.encode_prompt(said, "cpu", 1, False)[0]
    return states, pipe.unet(x, t, states).sample


def assert_same(expected, actual, base) -> None:
    """Two (states, prediction) agree, and neither is what the base model makes."""
    for name, a, b in zip(("text states", "prediction"), expected, actual, strict=True):
        assert relative(b, a) < LIMIT, f"{name} differ by {relative(b, a):.2e}"
    assert relative(expected[1], base[1]) > 100 * LIMIT
