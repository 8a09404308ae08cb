"""Class images out of a user's own pictures: those that are nearest to a class prompt.

Custom Diffusion (arXiv 2212.04488, section 3.2) holds on to a class by 200 real pictures of it. Its paper takes them by
the similarity of their captions to the class, its code asked a public index of pictures that has since been closed;
here CLIP compares the prompt with the pictures of a folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.class_request import check_request
from ..data.pictures import SUFFIXES, is_blank, picture_files, read_picture
from .image_encoders import ClipEncoder, JudgeEncoder, TextImageEncoder

COUNT = 200  # pictures of the class (Custom Diffusion, section 3.2)
BATCH = 16  # pictures that the encoder reads at once, each reduced to its input's size

Sources = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Found:
    """A picture, its caption and how near it is to the prompt: the cosine of their embeddings."""

    path: Path
    caption: str
    similarity: float


@dataclass(frozen=True)
class Retrieved:
    """The nearest pictures, the nearest first, where they are listed, and why others were not compared."""

    folder: Path
    pictures: list[Found]
    compared: int
    skipped: list[str]

    def __str__(self) -> str:
        near, far = self.pictures[0].similarity, self.pictures[-1].similarity
        return f"{len(self.pictures)} of {self.compared} pictures, similarity {near:.3f} to {far:.3f}"


def retrieve(
    pictures: Sources,
    prompt: str,
    out: str | Path,
    *,
    count: int = COUNT,
    clip: str | Path | None = None,
    judge: bool = False,
    copy: bool = False,
    progress: Callable[[int, int], Any] | None = None,
) -> Retrieved:
    """Find the pictures that are nearest to a class prompt, and list them as class images for training.

    Args:
        pictures: folders, with the folders in them, and single files.
        prompt: the class prompt, such as "photo of a cat".
        out: a new folder for images.txt and caption.txt, as Custom Diffusion's retrieval writes them: a path and a
            caption a line. A picture without a caption (a text file of its name beside it) gets the prompt.
        count: how many; fewer only where some turn out to be unusable, blank or copies of others.
        clip: folder of a CLIP model, which transformers reads; nothing is downloaded.
        judge: the embedded model's judge in place of CLIP, for pictures of its world.
        copy: copy the pictures into `out`, in place of paths to where they are.
        progress: called as progress(done, total) with each picture.

    Returns:
        The pictures, the nearest first. `Trainer(..., prior_folder=out)` or `--prior-folder` trains with them.
    """
    check_request(_listed(pictures), prompt, out, clip, judge)
    folder, prompt = Path(out).expanduser().resolve(), " ".join(prompt.split())
    files = _files(pictures)
    if count < 1:
        raise ValueError(f"count must be at least 1; it is {count}")
    if count > len(files):
        raise ValueError(
            f"{_called(pictures)} holds {len(files)} pictures, fewer than the {count} asked for. "
            f"Fix: --count {len(files)} (count={len(files)}) or less, or more pictures"
        )
    _place_for(folder)
    encoder: TextImageEncoder = ClipEncoder(clip) if clip else JudgeEncoder()
    skipped: list[str] = []
    found = list(_compared(encoder, prompt, files, skipped, progress))
    if not found:
        raise ValueError(f"{_called(pictures)} holds no picture that can be used: {'; '.join(skipped[:3])}")
    nearest = sorted(found, key=lambda picture: -picture.similarity)[:count]
    _write(nearest, folder, copy)
    return Retrieved(folder, nearest, len(found), skipped)


def _place_for(folder: Path) -> None:
    """ValueError now, and not after thousands of pictures, where the folder cannot be made."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); name a folder in another place") from None


def _listed(pictures: Sources) -> Sequence[str | Path]:
    return [pictures] if isinstance(pictures, (str, Path)) else pictures


def _called(pictures: Sources) -> str:
    return ", ".join(map(str, _listed(pictures)))


def _files(pictures: Sources) -> list[Path]:
    """Absolute paths of the pictures, each once."""
    found: dict[Path, None] = {}
    for source in _listed(pictures):
        path = Path(source).expanduser().absolute()
        found |= dict.fromkeys(picture_files(path) if path.is_dir() else [path])
    if not found:
        raise ValueError(f"{_called(pictures)} holds no pictures; looked for {', '.join(SUFFIXES)}")
    return list(found)


def _compared(
    encoder: TextImageEncoder,
    prompt: str,
    files: Sequence[Path],
    skipped: list[str],
    progress: Callable[[int, int], Any] | None,
) -> Iterator[Found]:
    """Each usable picture with its similarity; they are decoded one at a time and kept as the encoder's input."""
    text = encoder.text([prompt])[0]
    seen: dict[bytes, Path] = {}
    waiting: list[tuple[Path, str, Tensor]] = []
    for done, path in enumerate(files, 1):
        try:
            pixels, caption = _usable(path, seen)
        except ValueError as error:
            skipped.append(str(error))
        else:
            waiting.append((path, caption or prompt, encoder.pixels(pixels)))
        if waiting and (len(waiting) == BATCH or done == len(files)):
            similarities = encoder.of_pixels(torch.cat([pixels for *_, pixels in waiting])) @ text
            for (where, said, _), similarity in zip(waiting, similarities.tolist(), strict=True):
                yield Found(where, said, similarity)
            waiting.clear()
        if progress is not None:
            progress(done, len(files))


def _usable(path: Path, seen: dict[bytes, Path]) -> tuple[np.ndarray, str | None]:
    """Pixels and caption; ValueError where training would not use the picture, or `seen` holds the same one."""
    name = str(path)
    if len(name.splitlines()) > 1 or name.encode(errors="replace").decode() != name:
        raise ValueError(f"{name!r} must be one line of text, for a list of paths holds one a line: rename it")
    picture, _ = read_picture(path)
    if is_blank(picture.pixels):
        raise ValueError(f"{path} is blank")
    key = hashlib.blake2b(picture.pixels.tobytes(), digest_size=16).digest()
    first = seen.setdefault(key, path)
    if first != path:
        raise ValueError(f"{path} is the same picture as {first}")
    return picture.pixels, picture.caption


def _write(pictures: Sequence[Found], folder: Path, copy: bool) -> None:
    """images.txt, caption.txt and, where they are copied, images/: all of it or nothing."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        lines = [str(picture.path) for picture in pictures]
        if copy:
            (part / "images").mkdir()
            lines = [f"images/{i:05d}{picture.path.suffix.lower()}" for i, picture in enumerate(pictures)]
            for picture, line in zip(pictures, lines, strict=True):
                shutil.copyfile(picture.path, part / line)
        for name, content in (("images.txt", lines), ("caption.txt", [picture.caption for picture in pictures])):
            (part / name).write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
        if folder.is_dir():
            folder.rmdir()  # empty; not every system moves a folder onto one
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
