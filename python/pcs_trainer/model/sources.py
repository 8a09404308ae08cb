"""Where a model's parts come from: a diffusers folder, the hub's cache, or a single-file checkpoint.

A source gives one folder per part; nothing of a part is read or downloaded before it is asked for.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import UnsupportedModel
from .quiet import quiet

TINY = Path(__file__).parents[1] / "tiny" / "weights"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SINGLE_FILES = (".safetensors", ".ckpt")
CONFIGS = ["model_index.json", "*/*config*.json", "*/*.index*.json", "tokenizer*/*"]


def read_json(file: Path) -> dict[str, Any]:
    """A configuration file's JSON object; UnsupportedModel names a file that has none."""
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise UnsupportedModel(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{file} is invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{file} is not a JSON object")
    return value


class Folder:
    """A folder in diffusers' layout (unet/, text_encoder/, vae/, ..., model_index.json)."""

    def __init__(self, root: Path) -> None:
        self.root = self.path = root

    def part(self, name: str) -> Path:
        """The folder of a part."""
        folder = self.root / name
        if not folder.is_dir():
            raise UnsupportedModel(f"{self.root} has no folder {name!r}, which a model in diffusers' layout has")
        return folder

    def has(self, name: str) -> bool:
        """Whether the model has this part."""
        return (self.root / name).is_dir()

    def class_name(self) -> str | None:
        """The pipeline's class, where model_index.json names it."""
        index = self.root / "model_index.json"
        return read_json(index).get("_class_name") if index.is_file() else None


class Hub(Folder):
    """A model of the Hugging Face hub: configurations at once, the weights of a part when it is first used."""

    def __init__(self, name: str, fp16: bool) -> None:
        self.name = name
        self.fp16 = fp16
        super().__init__(self._fetch(CONFIGS, "model_index.json"))

    def _fetch(self, patterns: list[str], expected: str) -> Path:
        try:
            from huggingface_hub import snapshot_download
        except ImportError:
            raise UnsupportedModel(
                f"{self.name} is a name on the hub, and its client is missing. Fix: pip install huggingface_hub"
            ) from None
        try:
            root = Path(snapshot_download(self.name, allow_patterns=patterns))
        except Exception as error:  # the client raises its own, requests' and httpx's kinds
            reason = str(error).strip().split("\n")[0]
            raise UnsupportedModel(
                f"{self.name} is not a folder, and neither the hub nor its cache has {expected} of it ({reason}). "
                "Fix: connect to the internet once, or give --model a checkpoint file or folder that you have"
            ) from error
        if not list(root.glob(expected)):
            raise UnsupportedModel(f"the cached copy of {self.name} has no {expected}. Fix: load it once while online")
        return root

    def part(self, name: str) -> Path:
        """The folder of a part, its weights downloaded."""
        files = super().part(name)
        listed = [p.name for p in files.glob("*.safetensors*")]
        if name in ("scheduler", "low_res_scheduler", "tokenizer", "tokenizer_2") or any(
            n.endswith(".safetensors") for n in listed
        ):
            return files
        ours = f"{name}/*.fp16*.safetensors" if self.fp16 else f"{name}/*.safetensors"
        try:
            return self._fetch([ours], f"{name}/*.safetensors") / name
        except UnsupportedModel:
            return self._fetch([f"{name}/*.safetensors"], f"{name}/*.safetensors") / name


class SingleFile:
    """A checkpoint in one file; diffusers converts it, part by part, with the configuration files of `config`."""

    def __init__(self, file: Path, config: str | None) -> None:
        self.file = self.path = file
        self.options = {"config": config, "local_files_only": True} if config else {}

    @quiet("diffusers", "transformers")
    def converted(self, kind: Any, part: str | None) -> Any:
        """diffusers' own object of the class `kind` for a part, or for None its pipeline, which has the text side."""
        options = self.options | ({"subfolder": part} if part else {"unet": None, "vae": None, "safety_checker": None})
        try:
            return kind.from_single_file(str(self.file), **options)
        except Exception as error:  # diffusers raises many kinds
            reason = " ".join(str(error).split())[:300]
            raise UnsupportedModel(f"diffusers cannot convert {self.file} ({part or 'text'}): {reason}") from error


def find_source(where: str | Path, config: str | Path | None, fp16: bool) -> Folder | SingleFile:
    """The source that a name, a folder or a file means.

    Args:
        where: a diffusers folder, a checkpoint file, a hub name, or "tiny".
        config: configuration files for a checkpoint file, as a folder or hub name.
        fp16: whether a hub model's fp16 variant is preferred.
    """
    if str(where) == "tiny":
        return Folder(TINY)
    path = Path(where).expanduser()
    if path.is_dir():
        if not (path / "unet").is_dir():
            raise UnsupportedModel(f"{path} has no folder 'unet', which a model in diffusers' layout has")
        return Folder(path)
    if path.is_file():
        if path.suffix not in SINGLE_FILES:
            raise UnsupportedModel(f"{path} is neither a folder nor a checkpoint ({' or '.join(SINGLE_FILES)})")
        return SingleFile(path, None if config is None else str(config))
    if HUB_NAME.fullmatch(str(where)) and path.suffix not in SINGLE_FILES:
        return Hub(str(where), fp16)
    raise UnsupportedModel(f'{where} does not exist; give a diffusers folder, a checkpoint, a hub name or "tiny"')
