"""Concept and LoRA files with something wrong: one sentence, or a concept that draws; no other error, and no NaN."""

from __future__ import annotations

import random
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
