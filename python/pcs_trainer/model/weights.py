"""Safetensors into a network: memory-mapped, every name and shape checked, errors that name file and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel

Converter = Callable[[Tensor, Path], dict[str, Tensor]]
GROUP = 48  # tensors converted before the file is opened again, which lets go of the pages read so far


def weight_files(folder: Path, stem: str, dtype: torch.dtype | None) -> list[Path]:
    """The safetensors of one part, one file or its shards.

    Args:
        folder: the part's folder.
        stem: the file's name without suffix, as diffusers or transformers calls it.
        dtype: of the run; a 16-bit run takes the fp16 variant where there is one, others only where there is no other.
    """
    variants = ["", "fp16"] if dtype in (None, torch.float32, torch.float64) else ["fp16", ""]
    for variant in variants:
        name = f"{stem}.{variant}" if variant else stem
        if (folder / f"{name}.safetensors").is_file():
            return [folder / f"{name}.safetensors"]
        for index in (f"{name}.safetensors.index.json", f"{stem}.safetensors.index.{variant}.json"):
            if (folder / index).is_file():
                return _shards(folder / index)
    pickles = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
    if pickles:
        raise UnsupportedModel(
            f"{folder / pickles[0]} is a pickle, which could run code. Fix: save the model as safetensors"
        )
    raise UnsupportedModel(f"{folder} has no {stem}.safetensors (nor its fp16 variant, nor an index of shards)")


def stored_dtype(folder: Path | None, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of all tensors of the files that a run of `dtype` reads; None where there are several, or no file."""
    if folder is None:
        return None
    try:
        opened = [_open(file) for file in weight_files(folder, "diffusion_pytorch_model", dtype)]
    except UnsupportedModel:  # a plan needs configurations alone
        return None
    found = {file.get_tensor(name).dtype for file in opened for name in list(file.keys())}  # views
    return found.pop() if len(found) == 1 else None


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UnsupportedModel(f"{index} is not an index of shards: {error}") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise UnsupportedModel(f"{index} is not an index of shards: it names no files")
    for name in names:
        if not (index.parent / name).is_file():
            raise UnsupportedModel(f"{index.parent / name} is missing, though {index.name} names it")
    return [index.parent / name for name in names]


def _open(file: Path) -> Any:
    """safetensors' reader of a file."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except SafetensorError as error:
        raise UnsupportedModel(f"{file} is a truncated or corrupt safetensors file: {error}") from error
    except OSError as error:
        raise UnsupportedModel(f"{file} cannot be read: {error}") from error


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file, a view of the mapped file."""
    tensor: Tensor = _open(file).get_tensor(name)
    return tensor


def read_tensors(file: Path, device: str) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a file, in the file's own dtype; on the CPU it is a view of the mapped file, read when touched."""
    names = list(_open(file).keys())
    for start in range(0, len(names), GROUP):
        opened = _open(file)
        for name in names[start : start + GROUP]:
            yield name, opened.get_tensor(name).to(device)  # before any cast: files are mostly the smaller of the two


def _renamed(name: str, renames: dict[str, str]) -> str:
    for old, new in renames.items():
        name = name.replace(old, new)
    return name


def load_weights(
    network: nn.Module,
    files: list[Path],
    dtype: torch.dtype | None,
    device: str,
    renames: dict[str, str] | None = None,
    converted: Mapping[str, Converter] | None = None,
) -> None:
    """Give a network that was built on the meta device its weights.

    Args:
        network: the network; its parameters are replaced by the files' tensors, memory-mapped where that is possible.
        files: the safetensors of the part, one or several shards.
        dtype: of floating-point weights; None keeps the files' own.
        device: where the weights go.
        renames: parts of names in the files -> parts of the network's names.
        converted: names of tensors -> what makes of each, in the file's own dtype, the tensors that take its place.

    Raises:
        UnsupportedModel: names the file and the missing, unexpected or misshapen tensor.
    """
    wanted = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    state: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file, device):
            name = _renamed(name, renames or {})
            if name not in wanted:
                raise UnsupportedModel(f"{file} has a tensor {name!r} that this configuration does not have")
            if tuple(tensor.shape) != wanted[name]:
                raise UnsupportedModel(
                    f"{file}: tensor {name!r} has shape {list(tensor.shape)}; "
                    f"the configuration makes it {list(wanted[name])}"
                )
            wanted_dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            if converted and name in converted:
                state |= converted[name](tensor, file)
            else:  # a view would keep all pages of the file that were read beside it
                state[name] = tensor.to(wanted_dtype, copy=converted is not None)
    missing = [name for name in wanted if name not in state]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        places = ", ".join(str(file) for file in files)
        raise UnsupportedModel(f"{places} lacks the tensor {missing[0]!r}{more}")
    network.load_state_dict(state, strict=True, assign=True)
