"""Networks that look at pictures, so that drawn ones can be measured: the embedded model's judge, or CLIP and DINO.

Every one has text(prompts), image(pictures), subject(pictures) -> unit rows, and features(pictures) for distances
between sets. Pictures are uint8 arrays [H, W, 3]. Letters: N pictures, C features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Pictures = Sequence[np.ndarray]
CLIP_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class JudgeEyes:
    """The small networks that ship with the embedded model; they read 64 x 64 pictures of its world."""

    def __init__(self) -> None:
        from ..tiny.judge import load_judge

        self.judge = load_judge()

    def text(self, prompts: Sequence[str]) -> Tensor:
        return self.judge.text_embedding(list(prompts))

    def image(self, pictures: Pictures) -> Tensor:
        return self.judge.image_embedding(np.stack(pictures))

    def subject(self, pictures: Pictures) -> Tensor:
        return self.judge.subject_embedding(np.stack(pictures))

    def features(self, pictures: Pictures) -> Tensor:
        return self.judge.features(np.stack(pictures))

    def read(self, pictures: Pictures) -> dict[str, list[str]]:
        return self.judge.read(np.stack(pictures))


class NetworkEyes:
    """CLIP for text and pictures, DINO for subjects, from folders that transformers reads; nothing is downloaded."""

    def __init__(self, clip: str | Path | None = None, dino: str | Path | None = None, batch: int = 16) -> None:
        if clip is None and dino is None:
            raise ValueError(
                "to measure pictures of this model, name a CLIP or DINO model on this machine: clip=FOLDER, dino=FOLDER"
            )
        self.clip = None if clip is None else _Clip(_folder(clip, "CLIP", "openai/clip-vit-large-patch14"))
        self.dino = None if dino is None else _Dino(_folder(dino, "DINO", "facebook/dino-vits16"))
        self.batch = batch

    def text(self, prompts: Sequence[str]) -> Tensor | None:
        return None if self.clip is None else self._in_parts(self.clip.text, list(prompts))

    def image(self, pictures: Pictures) -> Tensor | None:
        return None if self.clip is None else self._in_parts(self.clip.image, list(pictures))

    def subject(self, pictures: Pictures) -> Tensor | None:
        return None if self.dino is None else self._in_parts(self.dino.image, list(pictures))

    def features(self, pictures: Pictures) -> Tensor:
        """DINO's, or CLIP's where there is no DINO; unit rows times the root of their width, as KID expects."""
        rows = self.subject(pictures) if self.dino is not None else self.image(pictures)
        return rows * rows.shape[1] ** 0.5  # type: ignore[union-attr]

    @torch.no_grad()
    def _in_parts(self, function: Any, items: list[Any]) -> Tensor:
        parts = [items[i : i + self.batch] for i in range(0, len(items), self.batch)]
        return torch.cat([F.normalize(function(part).float(), dim=1) for part in parts])


class _Clip:
    def __init__(self, folder: Path) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        self.net = _opened(CLIPModel, folder, "CLIP").eval()
        self.tokenizer = _opened(CLIPTokenizer, folder, "CLIP")
        self.prepare = _Preparation(folder, self.net.config.vision_config.image_size, CLIP_COLOURS)

    def text(self, prompts: list[str]) -> Tensor:
        length = self.net.config.text_config.max_position_embeddings
        said = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        pooled = self.net.text_model(said["input_ids"], attention_mask=said["attention_mask"]).pooler_output
        return self.net.text_projection(pooled)

    def image(self, pictures: list[np.ndarray]) -> Tensor:
        return self.net.visual_projection(self.net.vision_model(self.prepare(pictures)).pooler_output)


class _Dino:
    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel

        self.net = _opened(AutoModel, folder, "DINO").eval()
        size = getattr(self.net.config, "image_size", 224)
        self.prepare = _Preparation(folder, size, IMAGENET_COLOURS)

    def image(self, pictures: list[np.ndarray]) -> Tensor:
        return self.net(self.prepare(pictures)).last_hidden_state[:, 0]


class _Preparation:
    """Pictures to a network's input: the middle square at its size and colours, by its preprocessor_config.json."""

    def __init__(self, folder: Path, size: int, colours: tuple) -> None:
        file = folder / "preprocessor_config.json"
        said = json.loads(file.read_text()) if file.is_file() else {}
        whole = said.get("size", size)
        whole = whole if isinstance(whole, int) else whole.get("shortest_edge") or whole.get("height") or size
        crop = said.get("crop_size", whole) if said.get("do_center_crop", True) else whole
        self.whole = int(whole)
        self.crop = min(self.whole, int(crop if isinstance(crop, int) else crop["height"]))
        self.mean = torch.tensor(said.get("image_mean", colours[0]))[:, None, None]
        self.std = torch.tensor(said.get("image_std", colours[1]))[:, None, None]

    def __call__(self, pictures: list[np.ndarray]) -> Tensor:
        from PIL import Image

        rows = []
        for picture in pictures:
            height, width = picture.shape[:2]
            scale = self.whole / min(height, width)
            size = (max(self.whole, round(width * scale)), max(self.whole, round(height * scale)))
            pixels = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
            top, left = (size[1] - self.crop) // 2, (size[0] - self.crop) // 2
            square = torch.from_numpy(pixels[top : top + self.crop, left : left + self.crop].copy())
            rows.append((square.permute(2, 0, 1).float() / 255 - self.mean) / self.std)
        return torch.stack(rows)


def _folder(where: str | Path, kind: str, example: str) -> Path:
    folder = Path(where)
    if not (folder / "config.json").is_file():
        raise ValueError(f"there is no {kind} model in {folder}: put one there, such as {example}, or leave it out")
    return folder


def _opened(kind: Any, folder: Path, what: str) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder} is no {what} model that transformers reads ({_brief(error)})") from None


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def kid(a: Tensor, b: Tensor) -> float:
    """Kernel distance of two sets of features [N, C]: the unbiased MMD^2 with k(x, y) = (x.y / C + 1)^3.

    KID is this on Inception's features; on others it compares only with itself.
    """
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def own(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(own(a) + own(b) - 2 * kernel(a, b).mean())


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Of every row of a with every row of b, both unit."""
    return float((a @ b.T).mean())


def mean_other_cosine(a: Tensor) -> float:
    """Of every row with every other row of the same set."""
    scores = a @ a.T
    return float((scores.sum() - scores.diagonal().sum()) / (len(a) * (len(a) - 1)))
