"""Files that are there whole or not at all, and safetensors files read safely. No pickle is ever read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {  # torch's names of types -> a safetensors file's
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def free_bytes(folder: Path) -> int:
    """What the disk of a folder, or of its first parent that is there, has left."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def written(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file beside `path`, then move it there; a failure leaves nothing behind."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(part)):
            raise OSError(error.errno, error.strerror, str(path)) from error  # the file that was asked for
        raise
    return path


def written_text(path: Path, text: str) -> Path:
    """`written` for text, in UTF-8."""
    return written(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    """Write a safetensors file, whole or not at all, one tensor after another: no second copy of all is made.

    Raises OSError, one sentence with the fix, where it cannot be written (a full disk, a folder without permission).
    """
    try:
        return written(path, lambda part: _stream(part, tensors, header))
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise OSError(f"{path} could not be written ({reason}); free some space or choose another folder") from error


def _stream(part: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """The bytes of a safetensors file: the header's length, the header as JSON, the tensors, widest type first."""
    import torch

    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    told: dict[str, Any] = {"__metadata__": dict(header)} if header else {}
    at = 0
    for name in names:
        end = at + tensors[name].nbytes
        dtype = TYPES.get(str(tensors[name].dtype).removeprefix("torch."))
        if dtype is None:
            raise ValueError(f"{name} is {tensors[name].dtype}, which a safetensors file written here cannot hold")
        told[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            plain: Any = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            file.write(plain)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file as they are. Raises ValueError as `read_safetensors` does, but for NaN."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises ValueError, one sentence, for a file that is missing, a pickle, truncated, or holds NaN or infinity.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = dict(file.metadata() or {})
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    return tensors, header


def read_header(path: Path) -> dict[str, str]:
    """The header of a safetensors file, without its tensors. Raises ValueError as `read_safetensors` does."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raise ValueError where a tensor read from `path` holds NaN or infinity."""
    if not tensor.is_floating_point():
        return
    if tensor.dtype.itemsize == 1:  # float8 has no isfinite of its own
        tensor = tensor.float()
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{path}: the tensor {name!r} holds NaN or infinity; the file is unusable")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; give the path of a file")
    with path.open("rb") as stream:
        start = stream.read(16)
    # A safetensors file starts with its header's length in eight bytes, any of which may look like a pickle's first.
    if start[8:9] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise ValueError(f"{path} is a pickle, which can run code when it is read; convert it to safetensors first")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is a truncated or corrupt safetensors file ({reason}); get it again") from None
