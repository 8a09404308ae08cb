"""A concept merged into a whole diffusers pipeline folder: weights, words in the tokenizer, nothing left to attach."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...model.quiet import quiet
from ...model.text_adapters import file_name, token_table
from ...model.upscaler import level_of
from ...unet.int8 import SCALES, layers_for_8_bits
from ..base_weights import BaseWeights
from ..concept import Concept
from ..grammar import TEXT_PARTS, UNET, Part, parse, value_name, word_name
from .kohya import write_words
from .pairs import plain_pairs
from .portable import make_portable
from .report import Report

if TYPE_CHECKING:
    from ...model.model import Model
    from ...model.peers import Autoencoder

UPSCALE_FACTOR = 0.08333  # the scaling factor that diffusers' up-scaling pipeline writes over any other
NOTE, WRITTEN_BY = "modelspec.json", "pcs_trainer"  # the file by which an earlier export is known, and what it says
PLACES = ("_name_or_path", "name_or_path")  # keys in which transformers and diffusers keep where a model was read from


@quiet("diffusers", "transformers")
def write_pipeline(
    concept: Concept, folder: Path, model: Model, metadata: bool, word_files: bool, report: Report
) -> None:
    """Write a whole pipeline folder, complete or not at all; it replaces an earlier export and nothing else.

    Args:
        metadata: write how the concept was made.
        word_files: words as files in `embeddings/`, beside a tokenizer and a token table as the base model has them.
        report: gets the files and where each tensor went.
    """
    if folder.exists() and any(folder.iterdir()) and not _written_here(folder):
        raise ValueError(f"{folder} holds other files; a whole pipeline needs an empty or new folder")
    plain = replace(concept, words={}) if word_files else concept
    pipeline = merged_pipeline(plain, model)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        pipeline.save_pretrained(part, safe_serialization=True)
        make_portable(part)
        _remove_places(part)
        fields = {"written_by": WRITTEN_BY} | (concept.described("checkpoint") if metadata else {})
        (part / NOTE).write_text(json.dumps(fields, indent=2) + "\n")
        _swap(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if model.upscales and concept.small_noise is not None:
        level = level_of(model.low_res_schedule, concept.small_noise)
        report.notes.append(f"it was trained with little noise on the small picture: call it with noise_level={level}")
    layers = layers_for_8_bits(model.unet).values()
    if any(layer.weight_scales is not None and layer.original is None for layer in layers):
        report.notes.append(
            "the UNet's weights are what its 8 bits stand for, as a checkpoint file is not read again: "
            "load_model(..., weights='full') for the export gives the file's own"
        )
    report.files += sorted(file for file in folder.rglob("*") if file.is_file())
    if word_files:
        write_words(concept, folder, metadata, report)
    elif concept.words:
        _note_words(concept, report)
    for name in concept.tensors:
        if name not in report.skipped:
            report.written[name] = f"{parse(name).part}/: merged into the weights"
    for word, rows in plain.words.items():
        for e, row in enumerate(rows):
            report.written[word_name(e, word)] = f"{TEXT_PARTS[e]}/: {len(row)} rows of the token table"


def _note_words(concept: Concept, report: Report) -> None:
    """What a learned word in the token table means for those who read the folder."""
    report.notes.append(
        f"the token table has rows of its own for {', '.join(concept.words)}: diffusers opens such a model, ComfyUI "
        "and stable-diffusion.cpp do not (word_files=True, or --word-files, keeps the table and writes embedding files)"
    )
    plain = [word for word in concept.words if word[0].isalnum() or word[-1].isalnum()]
    if plain:
        # AddedToken's single_word would prevent it in transformers 5, and loses the word before a comma in 4.
        report.notes.append(
            f"{', '.join(plain)} is found inside longer words too in a whole pipeline, as it has no brackets: "
            "renamed('<word>') before the export prevents it"
        )


@quiet("diffusers", "transformers")
def merged_pipeline(concept: Concept, model: Model) -> Any:
    """diffusers' pipeline of a model with the concept in it; unchanged weights of the UNet are the model's own."""
    import diffusers

    with torch.device("meta"):  # each weight is given below: one in float32 would be made only to be dropped
        unet = diffusers.UNet2DConditionModel.from_config(_without_place(dict(model.unet.config)))
    unet.load_state_dict(_merged(concept, model, UNET, model.unet), strict=True, assign=True)
    encoders = [_encoder(concept, model, number) for number in range(len(model.text_encoders))]
    tokenizers = [copy.deepcopy(tokenizer) for tokenizer in model.tokenizers]
    for e, (encoder, tokenizer) in enumerate(zip(encoders, tokenizers, strict=True)):
        _add_words({word: rows[e] for word, rows in concept.words.items()}, tokenizer, encoder)
    config = dict(model.schedule.config)
    scheduler = getattr(diffusers, config.get("_class_name", "DDIMScheduler")).from_config(config)
    parts = {"unet": unet, "vae": model.vae, "scheduler": scheduler}
    parts |= {"text_encoder": encoders[0], "tokenizer": tokenizers[0]}
    if model.upscales:
        return _upscaler(model, parts)
    if len(encoders) == 2:
        return diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=encoders[1], tokenizer_2=tokenizers[1])
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _upscaler(model: Model, parts: dict[str, Any]) -> Any:
    """diffusers' up-scaling pipeline of these parts."""
    import diffusers

    config, index = dict(model.low_res_schedule.config), getattr(model.source, "root", Path()) / "model_index.json"
    low_res = getattr(diffusers, config.get("_class_name", "DDPMScheduler")).from_config(config)
    most = (json.loads(index.read_text()) if index.is_file() else {}).get("max_noise_level")
    parts |= {"vae": _rescaled(model.vae), "low_res_scheduler": low_res}
    limits = {} if most is None else {"max_noise_level": most}
    return diffusers.StableDiffusionUpscalePipeline(**parts, safety_checker=None, feature_extractor=None, **limits)


def _rescaled(vae: Autoencoder) -> Autoencoder:
    """The same autoencoder at UPSCALE_FACTOR, which the up-scaling pipeline writes into its configuration in any case.

    The factor moves into the 1x1 convolutions at its two ends, so that what the UNet reads and draws stays the same.
    """
    change = float(vae.config.scaling_factor) / UPSCALE_FACTOR
    if change == 1:
        return vae
    copied: Any = copy.deepcopy(vae)
    first, last = getattr(copied, "quant_conv", None), getattr(copied, "post_quant_conv", None)
    if first is None or last is None or getattr(vae.config, "shift_factor", None):
        raise ValueError(
            f"this autoencoder scales its latents by {vae.config.scaling_factor:g} and has no 1x1 convolutions to take "
            f"that up; diffusers' up-scaling pipeline takes {UPSCALE_FACTOR} alone, so the model goes into no pipeline"
        )
    with torch.no_grad():
        mean = first.out_channels // 2  # the rest are logarithms of variances
        first.weight[:mean] *= change
        first.bias[:mean] *= change
        first.bias[mean:] += 2 * math.log(change)
        last.weight /= change
    copied.register_to_config(scaling_factor=UPSCALE_FACTOR)
    rescaled: Autoencoder = copied
    return rescaled


def _merged(concept: Concept, model: Model, part: Part, network: nn.Module) -> dict[str, Tensor]:
    """A part's state dict with everything the concept changes in it, in the weights' own precision."""
    base, state = BaseWeights(model), {}
    changed = {slot.path for slot in concept.changes()} | {f"{slot.path}.weight" for slot in plain_pairs(concept)}
    for name, value in network.state_dict().items():
        if name.endswith(SCALES):
            continue
        full = value_name(part, name if part == UNET else file_name(name))
        tuned = base.tuned(concept, full) if full in changed else None
        whole = base.value(full).to(value.device) if value.dtype is torch.int8 else value
        state[name] = whole if tuned is None else tuned.to(whole)
    return state


def _encoder(concept: Concept, model: Model, number: int) -> nn.Module:
    ours = model.text_encoders[number]
    encoder = type(ours)(copy.deepcopy(ours.config)).to(next(ours.parameters()))
    encoder.load_state_dict(_merged(concept, model, TEXT_PARTS[number], ours), strict=True)
    return encoder.eval()


def _add_words(words: dict[str, Tensor], tokenizer: Any, encoder: Any) -> None:
    """Add tokens for the words' embeddings; the further ones of a word are word_1, word_2, as diffusers calls them."""
    new = {f"{word}_{i}" if i else word: row for word, rows in words.items() for i, row in enumerate(rows)}
    for token in new:
        if token in tokenizer.get_vocab():
            raise ValueError(f"{token!r} is a token of the base model already; give the concept another: .renamed(...)")
    if not new:
        return
    tokenizer.add_tokens(list(new))
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # all new rows are set below
    table = token_table(encoder).weight
    with torch.no_grad():
        for token, row in new.items():
            table[tokenizer.convert_tokens_to_ids(token)] = row.to(table)


def _without_place(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in PLACES}


def _remove_places(folder: Path) -> None:
    """Remove local paths (privacy) from the exported configuration."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        if isinstance(content, dict) and content.keys() & set(PLACES):
            file.write_text(json.dumps(_without_place(content), indent=2) + "\n")


def _written_here(folder: Path) -> bool:
    try:
        return json.loads((folder / NOTE).read_text())["written_by"] == WRITTEN_BY
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _swap(part: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)
