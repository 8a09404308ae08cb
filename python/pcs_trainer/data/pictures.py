"""The user's pictures: every one is decoded before anything else, and what cannot be used is named with its reason."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic")
UNREAD = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".psd", ".svg")  # pictures for people
SMALLEST = 16  # pixels a side: two latent pixels, below which there is nothing to learn from
# Pixels of a picture that is decoded whole, 8192 x 8192; a JPEG of more is decoded at a half, a quarter or an eighth.
LARGEST = 1 << 26
LONGEST_CAPTION = 10_000  # bytes; a text encoder reads 77 tokens, and the tokenizer took a minute for 10 MB
NARROW = 3  # times as long as wide: two thirds lie outside the middle square
LOOKED_AT = 1_000_000  # pixels by which a picture is judged


@dataclass
class Picture:
    """uint8 [H, W, 3], its caption and its subject mask [H, W] in [0, 1] where there are any."""

    pixels: np.ndarray
    name: str
    caption: str | None = None
    mask: np.ndarray | None = None

    @property
    def digest(self) -> str:
        parts = [self.pixels.tobytes(), str(self.pixels.shape).encode(), (self.caption or "").encode()]
        if self.mask is not None:
            parts.append(self.mask.tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()


@dataclass
class Loaded:
    """The pictures that can be used, and a sentence for each that cannot."""

    pictures: list[Picture]
    skipped: list[str]
    notes: list[str]


def load_pictures(source: Any, masks: str | Path | None = None, captions: Sequence[str] | None = None) -> Loaded:
    """Pictures from a folder, a file, or a list of files, PIL pictures and uint8 arrays; at least one must be good.

    captions: of a list, one a picture; a blank one leaves what stands beside the picture.
    """
    result = Loaded([], _unread(source), [])
    items = _items(source)
    for item, caption in zip(items, captions or [""] * len(items), strict=True):
        try:
            picture, notes = read_picture(item, masks)
        except ValueError as error:
            result.skipped.append(str(error))
        else:
            picture.caption = " ".join(caption.split()) or picture.caption
            result.pictures.append(picture)
            result.notes += notes
    result.notes += _remarks(result.pictures)
    if not result.pictures:
        reasons = "; ".join(result.skipped) or f"looked for {', '.join(SUFFIXES)}"
        raise ValueError(f"{_called(source)} holds no picture that can be used: {reasons}")
    return result


def _unread(source: Any) -> list[str]:
    """A sentence for each picture in a folder that is of a kind which is not read."""
    folder = Path(source) if isinstance(source, (str, Path)) else None
    if folder is None or not folder.is_dir():
        return []
    names = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in UNREAD)
    return [f"{name} is of a kind that is not read; save it as JPEG or PNG" for name in names]


def _called(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the list of images"


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.stem.endswith("-mask")


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder and the folders in it, masks and hidden ones left out, in the order of their paths."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files if not name.startswith(".") and _is_picture(Path(name))]
    return sorted(found)


def _items(source: Any) -> Sequence[Any]:
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            return sorted(file for file in path.iterdir() if _is_picture(file))
        if not path.exists():
            raise ValueError(f"{path} does not exist; give a folder of pictures, a picture, or a list of them")
        return [path]
    if hasattr(source, "convert") or isinstance(source, np.ndarray):
        return [source]
    if not isinstance(source, Iterable):
        raise ValueError(f"images must be a folder, a picture, or a list of pictures, not {source!r}")
    return list(source)


def read_picture(item: Any, masks: str | Path | None = None) -> tuple[Picture, list[str]]:
    """One picture with its caption and mask, and what was done to its pixels; ValueError says why it is unusable."""
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3:
            raise ValueError(f"an array must be uint8 [H, W, 3]; this one is {item.dtype} {list(item.shape)}")
        return _checked(Picture(item, "array")), []
    if not isinstance(item, (str, Path)) and not hasattr(item, "convert"):
        raise ValueError(f"expected a file, a PIL picture or a uint8 array among the images, got {item!r}")
    if not isinstance(item, (str, Path)):
        picture, notes = _pixels(item, getattr(item, "filename", "") or "picture")
        return _checked(picture), notes
    path = Path(item)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with _opened(path) as (image, smaller):
            image.load()
            picture, notes = _pixels(image, path.name)
    except ValueError:
        raise
    except Exception as error:  # Pillow raises many kinds
        fix = ". Fix: pip install pillow-heif, or save it as JPEG" if path.suffix.lower() == ".heic" else ""
        raise ValueError(f"{path} cannot be decoded ({' '.join(str(error).split())[:120]}){fix}") from None
    picture.caption, odd = _caption_of(path)
    picture.mask, other = _mask_of(path, masks, picture.pixels.shape[:2])
    return _checked(picture), [*smaller, *notes, *odd, *other]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, list[str]]]:
    """A picture that may be decoded, and a note where it will be smaller; ValueError where it has too many pixels."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is too large is said below
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has too many pixels ({str(error).split(',')[0]}); save it smaller") from None
    with image:
        width, height = image.size
        if width * height > LARGEST:
            share = next((s for s in (2, 4, 8) if width * height <= LARGEST * s * s), 8)
            image.draft(None, (width // share, height // share))  # does nothing where the format cannot
        if image.size[0] * image.size[1] > LARGEST:
            size = f"{width} x {height} pixels, more than {LARGEST / 1e6:.0f} million"
            raise ValueError(f"{path} has {size}, which are not decoded; save it smaller")
        whole = image.size == (width, height)
        note = f"{path.name} has {width} x {height} pixels: read at {image.size[0]} x {image.size[1]}"
        yield image, [] if whole else [note]


def _caption_of(path: Path) -> tuple[str | None, list[str]]:
    """The caption in the .txt file beside a picture, and a note where it is not plain text."""
    file = path.with_suffix(".txt")
    if not file.is_file():
        return None, []
    size = file.stat().st_size
    if size > LONGEST_CAPTION:
        raise ValueError(
            f"{file} has {size:,} bytes, too many for the caption of {path.name}. Fix: a few sentences, as a text "
            "encoder reads 77 tokens"
        )
    text = " ".join(file.read_text(encoding="utf-8", errors="replace").split())
    if not text:
        raise ValueError(f"{file} is empty: write the caption of {path.name} in it, or remove it")
    odd = "\ufffd" in text or not text.isprintable()
    return text, [f"{file.name} is not plain UTF-8 text: the caption may differ from what was written"] if odd else []


def _remarks(pictures: Sequence[Picture]) -> list[str]:
    """A sentence for each picture that can be used and will teach less than it seems to."""
    notes: list[str] = []
    seen: dict[tuple[Any, bytes], Picture] = {}
    for picture in pictures:
        height, width = picture.pixels.shape[:2]
        if is_blank(picture.pixels):
            notes.append(f"{picture.name} is all of one colour: there is nothing to learn from it")
        if max(height, width) > NARROW * min(height, width):
            notes.append(f"{picture.name} is {width} x {height}: most of it lies outside the square that is trained on")
        first = seen.setdefault((picture.pixels.shape, picture.pixels[::31, ::31].tobytes()), picture)
        if first is not picture and np.array_equal(first.pixels, picture.pixels):
            notes.append(f"{picture.name} is the same picture as {first.name}")
    return notes


def size_notes(pictures: Sequence[Picture], size: int) -> list[str]:
    """A sentence for each picture that is enlarged to more than twice its size, which shows no more than a blur."""
    sides = [(p.name, p.pixels.shape[1], p.pixels.shape[0]) for p in pictures]
    return [f"{name} has {w} x {h} pixels: enlarged to {size}" for name, w, h in sides if 2 * min(w, h) < size]


def _pixels(image: Any, name: str) -> tuple[Picture, list[str]]:
    """8-bit RGB, upright; what had to be done to get there is noted."""
    from PIL import Image, ImageOps

    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a phone's JPEG with a second, small picture or a depth map
        moving = getattr(image, "is_animated", False) and image.format != "TIFF"
        what = "is animated: its first frame is used" if moving else f"has {frames} pages: the first is used"
        notes.append(f"{name} {what}")
        image.seek(0)
    if (image.getexif() or {}).get(0x0112, 1) != 1:
        notes.append(f"{name} was turned upright as its EXIF data says")
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16-bit and float: scaled to 8 bits by the range it uses
        values = np.asarray(image, np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds NaN or infinity among its pixels; save it as an 8-bit picture")
        top = 65535.0 if image.mode.startswith("I") and values.max() > 255 else max(float(values.max()), 1e-6)
        image = Image.fromarray(np.rint(values / top * 255).clip(0, 255).astype(np.uint8))
        notes.append(f"{name} has more than 8 bits a channel: scaled to 8")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        notes.append(f"{name} is transparent: laid on white")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    elif image.mode not in ("RGB", "L", "P", "1"):
        notes.append(f"{name} was converted from {image.mode}")
    return Picture(np.asarray(image.convert("RGB")), str(name)), notes


def _checked(picture: Picture) -> Picture:
    height, width = picture.pixels.shape[:2]
    if min(height, width) < SMALLEST:
        raise ValueError(f"{picture.name} has {width} x {height} pixels; at least {SMALLEST} a side are needed")
    return picture


def _mask_of(path: Path, masks: str | Path | None, shape: tuple[int, ...]) -> tuple[np.ndarray | None, list[str]]:
    """From the folder of masks (same name), or a "-mask" file beside the picture: white is the subject.

    And a note where it has another shape than the picture.
    """
    folder = Path(masks) if masks else path.parent
    stem = path.stem if masks else f"{path.stem}-mask"
    found = [folder / f"{stem}{s}" for s in SUFFIXES if (folder / f"{stem}{s}").is_file()]
    if not found:
        if masks:
            raise ValueError(f"{path.name} has no mask of its name in {folder}")
        return None, []
    try:
        with _opened(found[0]) as (image, _):
            width, height = image.size
            mask = np.asarray(image.convert("L").resize((shape[1], shape[0])), np.float32) / 255
    except ValueError as error:
        raise ValueError(f"the mask {error}") from None
    except Exception as error:
        raise ValueError(f"the mask {found[0]} cannot be decoded ({' '.join(str(error).split())[:120]})") from None
    if not mask.max() > 0:
        raise ValueError(f"the mask {found[0]} is all black: white marks the subject")
    stretched = abs(width * shape[0] - height * shape[1]) > 0.02 * width * shape[0]  # a pixel of rounding is none
    notes = [f"the mask {found[0].name} is {width} x {height} and {path.name} {shape[1]} x {shape[0]}: stretched"]
    return mask, notes if stretched else []


def is_blank(pixels: np.ndarray) -> bool:
    """A picture with nothing in it, such as the black one a safety checker leaves."""
    # All of 12 million pixels took longer than their decoding. A deviation of 2 of 255 levels is JPEG's noise.
    every = max(1, round((pixels[..., 0].size / LOOKED_AT) ** 0.5))
    return float(pixels[::every, ::every].astype(np.float32).std(axis=(0, 1)).max()) < 2.0


def fitted(pixels: np.ndarray, size: int) -> np.ndarray:
    """size x size: the shorter side scaled to size, the middle cut out."""
    from PIL import Image

    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    scale = size / min(height, width)
    image = Image.fromarray(pixels)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    image = image.resize((wide, high), Image.Resampling.LANCZOS)
    left, top = (wide - size) // 2, (high - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
