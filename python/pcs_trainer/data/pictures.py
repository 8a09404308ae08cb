"""The user's pictures: every one is decoded before anything else, and what cannot be used is named with its reason."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic")
SMALLEST = 16  # pixels a side: two latent pixels, below which there is nothing to learn from


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
    result = Loaded([], [], [])
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
    if not result.pictures:
        reasons = "; ".join(result.skipped) or f"looked for {', '.join(SUFFIXES)}"
        raise ValueError(f"{_called(source)} holds no picture that can be used: {reasons}")
    return result


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
    from PIL import Image

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
        with Image.open(path) as image:
            image.load()
            picture, notes = _pixels(image, path.name)
    except ValueError:
        raise
    except Exception as error:  # Pillow raises many kinds
        fix = ". Fix: pip install pillow-heif, or save it as JPEG" if path.suffix.lower() == ".heic" else ""
        raise ValueError(f"{path} cannot be decoded ({' '.join(str(error).split())[:120]}){fix}") from None
    caption = path.with_suffix(".txt")
    if caption.is_file():
        picture.caption = " ".join(caption.read_text(encoding="utf-8", errors="replace").split()) or None
        if picture.caption is None:
            raise ValueError(f"{caption} is empty: write the caption of {path.name} in it, or remove it")
    picture.mask = _mask_of(path, masks, picture.pixels.shape[:2])
    return _checked(picture), notes


def _pixels(image: Any, name: str) -> tuple[Picture, list[str]]:
    """8-bit RGB, upright; what had to be done to get there is noted."""
    from PIL import Image, ImageOps

    notes = []
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"{name} is animated: its first frame is used")
        image.seek(0)
    if (image.getexif() or {}).get(0x0112, 1) != 1:
        notes.append(f"{name} was turned upright as its EXIF data says")
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16-bit and float: scaled to 8 bits by the range it uses
        values = np.asarray(image, np.float32)
        top = 65535.0 if image.mode.startswith("I") and values.max() > 255 else max(float(values.max()), 1e-6)
        image = Image.fromarray(np.rint(values / top * 255).astype(np.uint8))
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


def _mask_of(path: Path, masks: str | Path | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """From the folder of masks (same name), or a "-mask" file beside the picture: white is the subject."""
    from PIL import Image

    folder = Path(masks) if masks else path.parent
    stem = path.stem if masks else f"{path.stem}-mask"
    found = [folder / f"{stem}{s}" for s in SUFFIXES if (folder / f"{stem}{s}").is_file()]
    if not found:
        if masks:
            raise ValueError(f"{path.name} has no mask of its name in {folder}")
        return None
    try:
        with Image.open(found[0]) as image:
            mask = np.asarray(image.convert("L").resize((shape[1], shape[0])), np.float32) / 255
    except Exception as error:
        raise ValueError(f"the mask {found[0]} cannot be decoded ({' '.join(str(error).split())[:120]})") from None
    if not mask.max() > 0:
        raise ValueError(f"the mask {found[0]} is all black: white marks the subject")
    return mask


def is_blank(pixels: np.ndarray) -> bool:
    """A picture with nothing in it, such as the black one a safety checker leaves."""
    # A deviation of 2 of 255 levels is JPEG's noise on one colour.
    return float(pixels.astype(np.float32).std(axis=(0, 1)).max()) < 2.0


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
