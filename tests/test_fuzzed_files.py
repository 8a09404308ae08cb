"""Concept and LoRA files with something wrong: one sentence, or a concept that draws; no other error, and no NaN."""

from __future__ import annotations

import random
import re
import time

import pytest
import torch
from concept_cases import custom_diffusion, dreambooth_lora, ours, residuals, textboost
from fuzz_cases import mutated
from pcs_trainer.concept.formats.reading import import_concept
from pcs_trainer.concept.formats.writing import export
from pcs_trainer.concept.loading import load_concept
from pcs_trainer.files import read_safetensors
from safetensors.torch import save_file

# The number of files a test makes; thousands, by this one constant, were run when the readers were written.
COUNT = 60
LONGEST = 5.0  # seconds for a file of 60 layers, which takes 0.05: one that takes so long does not end


def small(concept):
    """The concept with few enough tensors that a file is read in a few milliseconds."""
    for name in [n for n in concept.tensors if ".up_blocks." in n or "down_blocks" in n]:
        del concept.tensors[name]
    return concept


def originals(model, folder):
    """Files of every kind: our own, kohya's and diffusers'."""
    context = "context.mid_block.attentions.0.transformer_blocks.0.attn2"
    tensors = {f"{context}.down": 0.1 * torch.randn(2, 128), f"{context}.up": torch.randn(128, 2)}
    for make in (residuals, dreambooth_lora, textboost, custom_diffusion):
        concept = small(make(model))
        if make is residuals and context.removeprefix("context.") in model.unet.attention_names():
            concept.tensors |= tensors
        yield load_concept, concept.save(folder / f"{make.__name__}.safetensors")
        for format in ("kohya", "diffusers"):
            for file in export(concept, folder / make.__name__ / format, format, model).files:
                yield import_concept, file


def refused(read, file, model) -> str | None:
    """The sentence of a refusal; None for a concept that is taken, whose predictions are then finite."""
    started = time.perf_counter()
    try:
        concept = read(file, model)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000 and str(file.stem) in str(error), error
        return str(error)
    finally:
        assert time.perf_counter() - started < LONGEST, file
    states, prediction = ours(model, [concept], [concept.instance_prompt, "a cat"])
    assert states.isfinite().all() and prediction.isfinite().all()
    return None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_mutated_files(model, tmp_path, seed):
    files = list(originals(model, tmp_path))
    rng, taken, sentences = random.Random(seed), 0, []
    for i in range(COUNT):
        read, file = files[i % len(files)]
        tensors, header = mutated(*read_safetensors(file), rng)
        case = tmp_path / f"case{i}.safetensors"
        try:
            save_file(tensors, case, header)
        except Exception:  # not a file that safetensors itself can write
            continue
        sentence = refused(read, case, model)
        taken += sentence is None
        sentences += [sentence] if sentence else []
        case.unlink()
    assert len(sentences) > COUNT / 4 and taken > COUNT / 10


PLACE = "mid_block.attentions.0"
DOWN, UP = f"unet.{PLACE}.proj_out.down", f"unet.{PLACE}.proj_out.up"
WORD, BLOCK = "word.0.<thing>", f"context.{PLACE}.transformer_blocks.0.attn2"
FLOAT8 = torch.float8_e4m3fn
NO_PRODUCT = r"make no low-rank residual; expected \[rank, inputs\] and \[outputs, rank\]"
NO_NAME = "does not name a tensor of a concept; expected unet., "


def renamed(old, new):
    return lambda tensors: {new if name == old else name: t for name, t in tensors.items()}


def changed(names, change):
    return lambda tensors: tensors | {name: change(tensors[name]) for name in names}


# What is done to a file of one pair and one word, and what is said of it.
NAMED = {
    "one half renamed": (renamed(UP, UP + "s"), f"has no partner '{UP}'; the file is incomplete"),
    "a word without a name": (renamed(WORD, "word.0."), NO_NAME),
    "a word of no encoder": (renamed(WORD, "word.nope.<thing>"), NO_NAME),
    "a word of the second encoder": (renamed(WORD, "word.1.<thing>"), "no token embeddings for the first text encoder"),
    "one half on no block": (
        lambda t: t | {"context.nope.down": torch.ones(2, 128)},
        "has no partner 'context.nope.up'",
    ),
    "a pair on no block": (
        lambda t: t | {"context.nope.down": torch.ones(2, 128), "context.nope.up": torch.ones(128, 2)},
        "this model has no block 'nope' that reads text states of 128 to 128",
    ),
    "one row less of the first half": (changed([DOWN], lambda t: t[1:]), NO_PRODUCT),
    "one row less of the second": (changed([UP], lambda t: t[1:]), "has no projection .* of 128 to 127"),
    "one column less of a word": (changed([WORD], lambda t: t[:, 1:]), r"do not have this model's text width \[128\]"),
    "flattened": (changed([UP], torch.flatten), NO_PRODUCT),
    "both flattened": (changed([DOWN, UP], torch.flatten), NO_PRODUCT),
    "a word flattened": (changed([WORD], torch.flatten), r"have shapes \[\[128\]\]; expected \[rows, width\]"),
    "transposed": (changed([DOWN], lambda t: t.T), NO_PRODUCT),
    "both transposed": (changed([DOWN, UP], lambda t: t.T), "has no projection .* of 7 to 7"),
    "a word transposed": (changed([WORD], lambda t: t.T), r"do not have this model's text width \[128\]"),
    "different ranks": (changed([DOWN], lambda t: t.new_ones(3, 128)), NO_PRODUCT),
    "a scalar": (changed([UP], lambda t: t[0, 0]), NO_PRODUCT),
    "a word that is a scalar": (changed([WORD], lambda t: t[0, 0]), r"have shapes \[\[\]\]; expected \[rows, width\]"),
    "no rank": (changed([DOWN, UP], lambda t: t[:0] if t.shape[1] == 128 else t[:, :0]), NO_PRODUCT),
    "a word of no rows": (changed([WORD], lambda t: t[:0]), r"have shapes \[\[0, 128\]\]; expected \[rows, width\]"),
    "integers": (changed([UP], lambda t: t.to(torch.int8)), "is of torch.int8; expected floating-point numbers"),
    "one half in bfloat16": (changed([UP], torch.Tensor.bfloat16), None),
    "the pair in bfloat16": (changed([DOWN, UP], torch.Tensor.bfloat16), None),
    "all in bfloat16": (changed([DOWN, UP, WORD], torch.Tensor.bfloat16), None),
    "all in float16": (changed([DOWN, UP, WORD], torch.Tensor.half), None),
    "all in float64": (changed([DOWN, UP, WORD], torch.Tensor.double), None),
    "one half in float8": (changed([DOWN], lambda t: t.to(FLOAT8)), None),
    "all in float8": (changed([DOWN, UP, WORD], lambda t: t.to(FLOAT8)), None),
}


@pytest.fixture(scope="module")
def one_pair(model, tmp_path_factory):
    """A file of our own with a pair and a word, and the same as diffusers' LoRA file."""
    folder = tmp_path_factory.mktemp("pair")
    concept = small(residuals(model))
    files = export(concept, folder, "diffusers", model).files
    return concept.save(folder / "own.safetensors"), next(file for file in files if "lora" in file.name)


@pytest.mark.parametrize("case", NAMED)
def test_a_file_with_one_thing_wrong(model, one_pair, tmp_path, case):
    change, said = NAMED[case]
    tensors, header = read_safetensors(one_pair[0])
    assert tensors.keys() == {DOWN, UP, WORD} and tensors[UP].shape == (128, 7)
    file = tmp_path / "case.safetensors"
    save_file({name: t.contiguous() for name, t in change(tensors).items()}, file, header)
    sentence = refused(load_concept, file, model)
    assert sentence is None if said is None else re.search(said, sentence or ""), sentence


LORA = {
    "all in bfloat16": (torch.Tensor.bfloat16, None),
    "all in float8": (lambda t: t.to(FLOAT8), None),
    "one row less": (lambda t: t[1:], r"has down \[6, 128, 1, 1\], up \[127, 7, 1, 1\]; this model's weight there is"),
    "flattened": (torch.flatten, r"has shape \[896\]; expected a matrix"),
    "transposed": (lambda t: t[..., 0, 0].T, r"has down \[128, 7\], up \[7, 128\]; this model's weight there is"),
    "scalars": (lambda t: t.flatten()[0], r"has shape \[\]; expected a matrix"),
    "empty": (lambda t: t[:0], r"has shape \[0, \d+, 1, 1\]; expected a matrix"),
}


@pytest.mark.parametrize("case", LORA)
def test_a_lora_with_one_thing_wrong(model, one_pair, tmp_path, case):
    change, said = LORA[case]
    tensors, header = read_safetensors(one_pair[1])
    file = tmp_path / "case.safetensors"
    save_file({name: change(t).contiguous() for name, t in tensors.items()}, file, header)
    sentence = refused(import_concept, file, model)
    assert sentence is None if said is None else re.search(said, sentence or ""), sentence
