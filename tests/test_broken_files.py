"""Files that cannot be taken are refused in one sentence that names the file; no pickle is ever executed."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from concept_cases import residuals
from pcs_trainer.concept.formats.reading import import_concept, read_file
from pcs_trainer.concept.formats.writing import export
from safetensors.torch import load_file, save_file


def refused(path, model, match, **options):
    with pytest.raises(ValueError, match=match) as caught:
        import_concept(path, model, **options)
    assert "\n" not in str(caught.value) and str(path.name).split(".")[0] in str(caught.value)


def lora_file(model, file, **changes):
    export(residuals(model), file.parent / "source", "kohya", model)
    tensors = load_file(file.parent / "source" / "thing.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, file)
    return tensors


PROJECTION = "lora_unet_mid_block_attentions_0_proj_out"


@pytest.mark.slow
def test_broken_safetensors(model, tmp_path):
    file = tmp_path / "f.safetensors"
    lora_file(model, file)
    whole = file.read_bytes()
    for cut in (0, 7, 100, len(whole) - 10):
        file.write_bytes(whole[:cut])
        refused(file, model, "truncated or corrupt safetensors file")
    for bad in (torch.nan, torch.inf):
        up = torch.full((128, 7, 1, 1), 0.1)
        up[3, 2] = bad
        lora_file(model, file, **{f"{PROJECTION}.lora_up.weight": up})
        refused(file, model, rf"{PROJECTION}\.lora_up\.weight.*NaN or infinity")
    refused(tmp_path / "nowhere.safetensors", model, "is not there")


def test_shapes_that_do_not_fit(model, tmp_path):
    file = tmp_path / "f.safetensors"
    lora_file(model, file, **{f"{PROJECTION}.lora_up.weight": torch.ones(320, 7, 1, 1)})
    refused(file, model, r"unet\.mid_block\.attentions\.0\.proj_out")
    save_file({"lora_unet_conv_out.diff": torch.ones(4, 64, 3, 3)}, file)
    refused(file, model, r"unet\.conv_out\.weight\.diff.*shape \[4, 64, 3, 3\].*\[8, 64, 3, 3\]")
    save_file({"<word>": torch.ones(2, 768)}, file)
    refused(file, model, r"'<word>'.*\[2, 768\].*text width is \[128\]")
    save_file({"clip_l": torch.ones(1, 128), "clip_g": torch.ones(1, 1280)}, file)
    refused(file, model, "text width")
    lora_file(model, file, **{f"{PROJECTION}.lora_up.weight": None})
    refused(file, model, "has no 'up' half")


def test_foreign_keys_are_refused_unless_forced(model, tmp_path):
    file = tmp_path / "f.safetensors"
    foreign = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(4, 8)}
    lora_file(model, file, **foreign, **{"lora_unet_mid_block_attentions_9_proj_out.alpha": torch.ones(())})
    refused(file, model, "for no layer of this model .*attentions_9_proj_out")
    concept = import_concept(file, model, force=True)
    assert "double_blocks" in concept.meta["left_out"] and len(concept.pairs()) == len(residuals(model).pairs())
    save_file(foreign, file)
    refused(file, model, "nothing that this package knows", force=True)
    save_file({f"{PROJECTION}.hada_w1_a": torch.ones(4, 4)}, file)
    refused(file, model, "has no 'hada_w1_b' of its low-rank factors")


def test_every_length_of_header_is_read(tmp_path):
    """The first byte of a safetensors file is part of a length, and may be any; a pickle's is always 0x80."""
    file, first = tmp_path / "f.safetensors", set()
    for i in range(0, 512, 8):
        save_file({"<word>": torch.ones(1, 128)}, file, {"note": "x" * i})
        first.add(file.read_bytes()[0])
        assert list(read_file(file)[0]) == ["<word>"]
    assert 0x80 in first and len(first) == 32


def test_a_file_that_changes_nothing_is_said(model, tmp_path):
    file = tmp_path / "f.safetensors"
    save_file(
        {f"{PROJECTION}.lora_up.weight": torch.zeros(128, 2), f"{PROJECTION}.lora_down.weight": torch.ones(2, 128)},
        file,
    )
    refused(file, model, "changes nothing")
    assert import_concept(file, model, force=True).pairs()


def test_bad_header_and_whole_models(model, tmp_path):
    file = tmp_path / "f.safetensors"
    pair = {f"{PROJECTION}.lora_up.weight": torch.ones(128, 2), f"{PROJECTION}.lora_down.weight": torch.ones(2, 128)}
    save_file(pair, file, {"lora_adapter_metadata": "{"})
    refused(file, model, "lora_adapter_metadata cannot be read")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "model_index.json").write_text(json.dumps({}))
    refused(tmp_path / "whole", model, "is a whole model")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", model, "no safetensors")


class Trap:
    """Unpickling this writes a file: the sign that code was run."""

    def __init__(self, sign):
        self.sign = sign

    def __reduce__(self):
        return (open, (str(self.sign), "w"))


@pytest.mark.parametrize("name", ["learned_embeds.bin", "evil.pt", "evil.safetensors", "evil.ckpt"])
@pytest.mark.parametrize("plain", [True, False])
def test_no_pickle_is_executed(model, tmp_path, name, plain):
    sign, file = tmp_path / "sign", tmp_path / name
    content = {"<x>": torch.ones(1, 128), "more": Trap(sign)}
    if plain:
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    refused(file, model, "pickle")
    assert not sign.exists()
    refused(file, model, "pickle", force=True, token="<y>")
    assert not sign.exists()


def test_nan_in_a_pickle_is_named(model, tmp_path):
    torch.save({"<x>": torch.full((1, 128), torch.nan)}, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", model, "'<x>' holds NaN")
