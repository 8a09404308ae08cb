"""Image encoders for evaluation: CLIP, DINO, and the embedded model's judge.

Pictures are uint8 arrays [H, W, 3]. Letters: N pictures, C features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.pictures import fitted
from ..model.quiet import quiet

Pictures: TypeAlias = Sequence[np.ndarray]
CLIP_EXAMPLE = "openai/clip-vit-base-patch32"  # DreamBooth's and Custom Diffusion's tables are by ViT-B/32
# Means and deviations that the networks were trained with, where their folder does not say.
CLIP_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ImageEncoder(Protocol):
    """What measures pictures; None where it has no network for a question."""

    def text(self, prompts: Sequence[str]) -> Tensor | None:
        """Unit rows [N, C] of prompts, comparable with `image`."""

    def image(self, pictures: Pictures) -> Tensor | None:
        """Unit rows [N, C] of pictures."""

    def subject(self, pictures: Pictures) -> Tensor | None:
        """Unit rows [N, C]; those of pictures of one subject are close."""

    def features(self, pictures: Pictures) -> Tensor:
        """Rows [N, C] for distances between sets of pictures."""
        raise NotImplementedError

    def read(self, pictures: Pictures) -> dict[str, list[str]] | None:
        """What the pictures show, field by field."""


class TextImageEncoder(Protocol):
    """What compares pictures with text one picture at a time: of many that are compared none but one is held whole."""

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Unit rows [N, C] of prompts."""
        raise NotImplementedError

    def pixels(self, picture: np.ndarray) -> Tensor:
        """What the network reads of one picture of any size, [1, 3, S, S]."""
        raise NotImplementedError

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Unit rows [N, C] of a batch of `pixels`."""
        raise NotImplementedError


class JudgeEncoder:
    """The small networks that ship with the embedded model; they read 64 x 64 pictures of its world."""

    def __init__(self) -> None:
        from ..tiny.judge import load_judge

        self.judge = load_judge()

    def text(self, prompts: Sequence[str]) -> Tensor:
        return self.judge.text_embedding(list(prompts))

    def image(self, pictures: Pictures) -> Tensor:
        return self.judge.image_embedding(np.stack(pictures))

    def pixels(self, picture: np.ndarray) -> Tensor:
        """Its middle as 64 x 64 pixels in [-1, 1]."""
        from ..tiny.common import to_tensor
        from ..tiny.world import SIZE

        return to_tensor(np.stack([fitted(picture, SIZE)]))

    def of_pixels(self, pixels: Tensor) -> Tensor:
        return self.judge.image_embedding(pixels)

    def subject(self, pictures: Pictures) -> Tensor:
        return self.judge.subject_embedding(np.stack(pictures))

    def features(self, pictures: Pictures) -> Tensor:
        return self.judge.features(np.stack(pictures))

    def read(self, pictures: Pictures) -> dict[str, list[str]]:
        return self.judge.read(np.stack(pictures))


class ClipDinoEncoder:
    """CLIP for text and pictures, DINO for subjects, from folders that transformers reads; nothing is downloaded.

    Args:
        clip, dino: the folders; at least one.
        batch: pictures or prompts at once.
    """

    def __init__(self, clip: str | Path | None = None, dino: str | Path | None = None, batch: int = 16) -> None:
        if clip is None and dino is None:
            raise ValueError(
                "to measure pictures of this model, name a CLIP or DINO model on this machine: clip=FOLDER, dino=FOLDER"
            )
        self.clip = None if clip is None else _Clip(_folder(clip, "CLIP", CLIP_EXAMPLE))
        self.dino = None if dino is None else _Dino(_folder(dino, "DINO", "facebook/dino-vits16"))
        self.batch = batch

    def text(self, prompts: Sequence[str]) -> Tensor | None:
        return None if self.clip is None else self._in_batches(self.clip.text, list(prompts))

    def image(self, pictures: Pictures) -> Tensor | None:
        return None if self.clip is None else self._in_batches(self.clip.image, list(pictures))

    def subject(self, pictures: Pictures) -> Tensor | None:
        return None if self.dino is None else self._in_batches(self.dino.image, list(pictures))

    def features(self, pictures: Pictures) -> Tensor:
        """DINO's rows, or CLIP's where there is no DINO; times the root of their width, as KID's kernel expects."""
        rows = self.subject(pictures)
        rows = self.image(pictures) if rows is None else rows
        assert rows is not None  # __init__ asks for one of the two
        return rows * rows.shape[1] ** 0.5

    def read(self, pictures: Pictures) -> None:  # noqa: ARG002  # the judge's question: CLIP and DINO have no answer
        return None

    @torch.no_grad()
    def _in_batches(self, function: Callable[[list[Any]], Tensor], items: list[Any]) -> Tensor:
        parts = [items[i : i + self.batch] for i in range(0, len(items), self.batch)]
        return torch.cat([F.normalize(function(part).float(), dim=1) for part in parts])


class ClipEncoder:
    """CLIP alone, from a folder, for pictures that are compared with text one at a time."""

    def __init__(self, clip: str | Path) -> None:
        self.clip = _Clip(_folder(clip, "CLIP", CLIP_EXAMPLE))

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        return F.normalize(self.clip.text(list(prompts)).float(), dim=1)

    def pixels(self, picture: np.ndarray) -> Tensor:
        return self.clip.preprocess([picture])

    @torch.no_grad()
    def of_pixels(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.clip.of_pixels(pixels).float(), dim=1)


class _Clip:
    @quiet("transformers")
    def __init__(self, folder: Path) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        self.net = _opened(CLIPModel, folder, "CLIP").eval()
        self.tokenizer = _opened(CLIPTokenizer, folder, "CLIP")
        self.preprocess = _Preprocessing(folder, self.net.config.vision_config.image_size, CLIP_COLOURS)

    def text(self, prompts: list[str]) -> Tensor:
        length = self.net.config.text_config.max_position_embeddings
        said = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        pooled = self.net.text_model(said["input_ids"], attention_mask=said["attention_mask"]).pooler_output
        return self.net.text_projection(pooled)

    def image(self, pictures: list[np.ndarray]) -> Tensor:
        return self.of_pixels(self.preprocess(pictures))

    def of_pixels(self, pixels: Tensor) -> Tensor:
        return self.net.visual_projection(self.net.vision_model(pixels).pooler_output)


class _Dino:
    @quiet("transformers")
    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel

        self.net = _opened(AutoModel, folder, "DINO").eval()
        size = getattr(self.net.config, "image_size", 224)
        self.preprocess = _Preprocessing(folder, size, IMAGENET_COLOURS)

    def image(self, pictures: list[np.ndarray]) -> Tensor:
        return self.net(self.preprocess(pictures)).last_hidden_state[:, 0]


class _Preprocessing:
    """Pictures to a network's input: resize, centre crop, normalize, as its preprocessor_config.json says."""

    def __init__(self, folder: Path, size: int, colours: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
        file = folder / "preprocessor_config.json"
        said = json.loads(file.read_text()) if file.is_file() else {}
        short = said.get("size", size)
        short = short if isinstance(short, int) else short.get("shortest_edge") or short.get("height") or size
        crop = said.get("crop_size", short) if said.get("do_center_crop", True) else short
        self.resized = int(short)  # pixels of the shorter side
        self.crop = min(self.resized, int(crop if isinstance(crop, int) else crop["height"]))
        self.mean = torch.tensor(said.get("image_mean", colours[0]))[:, None, None]
        self.std = torch.tensor(said.get("image_std", colours[1]))[:, None, None]

    def __call__(self, pictures: list[np.ndarray]) -> Tensor:
        from PIL import Image

        rows = []
        for picture in pictures:
            height, width = picture.shape[:2]
            scale = self.resized / min(height, width)
            size = (max(self.resized, round(width * scale)), max(self.resized, round(height * scale)))
            pixels = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
            top, left = (size[1] - self.crop) // 2, (size[0] - self.crop) // 2
            square = torch.from_numpy(pixels[top : top + self.crop, left : left + self.crop].copy())
            rows.append((square.permute(2, 0, 1).float() / 255 - self.mean) / self.std)
        return torch.stack(rows)


def _folder(where: str | Path, kind: str, example: str) -> Path:
    folder = Path(where)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"there is no {kind} model in {folder}. Fix: put one there, such as {example}, or leave it out"
        )
    return folder


def _opened(kind: Any, folder: Path, what: str) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder} is not a {what} model that transformers can read ({_brief(error)})") from None


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def kid(a: Tensor, b: Tensor) -> float:
    """Kernel distance of two sets of features [N, C]: the unbiased MMD^2 with k(x, y) = (x.y / C + 1)^3.

    KID (arXiv 1801.01401) is this on Inception's features; on others its values compare only with each other.
    """
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def own(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(own(a) + own(b) - 2 * kernel(a, b).mean())


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine of every row of a with every row of b, both unit."""
    return float((a @ b.T).mean())


def mean_other_cosine(a: Tensor) -> float:
    """Mean cosine of every row with every other row of the same set."""
    scores = a @ a.T
    return float((scores.sum() - scores.diagonal().sum()) / (len(a) * (len(a) - 1)))
