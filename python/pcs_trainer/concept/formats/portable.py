"""A pipeline folder that transformers has saved, in the form that older versions and other programs read too.

transformers 5 drops `text_model.` from a text encoder's names where the encoder was built from its configuration, and
saves a tokenizer as tokenizer.json alone. transformers 4 then draws the encoder's weights at random, and the loaders of
ComfyUI and of kohya's tools find none of its names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...files import read_header, read_tensors, write_safetensors, written_text
from ...model.text_adapters import file_name

MERGES_VERSION = "#version: 0.2"  # the first line of every merges.txt, which readers skip


def make_portable(folder: Path) -> None:
    """Give the text encoders of a pipeline folder the names of checkpoint files, the tokenizers their plain files."""
    for encoder in sorted(folder.glob("text_encoder*")):
        for file in sorted(encoder.glob("*.safetensors")):
            _restore_names(file)
    for tokenizer in sorted(folder.glob("tokenizer*")):
        _add_plain_files(tokenizer)


def _restore_names(file: Path) -> None:
    tensors = read_tensors(file)
    if any(name != file_name(name) for name in tensors):
        write_safetensors(file, {file_name(name): t for name, t in tensors.items()}, read_header(file))


def _add_plain_files(tokenizer: Path) -> None:
    """Write vocab.json, merges.txt and the added tokens' record where only tokenizer.json holds them."""
    whole = tokenizer / "tokenizer.json"
    if not whole.is_file() or (tokenizer / "vocab.json").is_file():
        return
    content = json.loads(whole.read_text(encoding="utf-8"))
    model: dict[str, Any] = content["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    written_text(tokenizer / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False) + "\n")
    written_text(tokenizer / "merges.txt", "\n".join([MERGES_VERSION, *merges]) + "\n")
    added = {str(t["id"]): {key: t[key] for key in t if key != "id"} for t in content["added_tokens"]}
    file = tokenizer / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"added_tokens_decoder": added}
    written_text(file, json.dumps(config, indent=2) + "\n")
