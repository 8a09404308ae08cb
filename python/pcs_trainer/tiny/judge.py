"""The judge: small networks, trained apart from the model, that read pictures of the tiny world.

    judge = load_judge()
    judge.read(pictures)               -> {"kind": [...], "colour": [...], "background": [...], ...}
    judge.subject_embedding(pictures)  -> [N, 128] unit rows: same subject, high cosine (the part of DINO)
    judge.image_embedding(pictures), judge.text_embedding(captions) -> [N, 128] unit rows (the part of CLIP)
    judge.features(pictures)           -> [N, 256] for distances between sets of pictures (the part of Inception)

Pictures are uint8 arrays [N, 64, 64, 3], lists of such, or float tensors [N, 3, 64, 64] in [-1, 1].
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..files import written, written_text
from .common import JUDGE_WEIGHTS, to_tensor
from .world import BACKGROUNDS, CLASSES, COLOURS, LIGHTS, PATTERNS, POSITIONS, SCALES, SIZE, STYLES, Scene

Pictures: TypeAlias = NDArray[np.uint8] | Sequence[NDArray[np.uint8]] | Tensor

FIELDS = {
    "kind": CLASSES,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "background": BACKGROUNDS,
    "position": POSITIONS,
    "scale": tuple(SCALES),
    "light": LIGHTS,
    "style": STYLES,
}


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm around a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Backbone(nn.Module):
    """64x64 picture (and the coordinates of its pixels) -> 256 features."""

    grid: Tensor

    def __init__(self, widths: Sequence[int] = (24, 48, 96, 160), out: int = 256) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 5  # red, green, blue, and the two coordinates
        for i, wider in enumerate(widths):
            kernel = 5 if i == 0 else 3
            layers += [
                nn.Conv2d(width, wider, kernel, 2, kernel // 2, bias=False),
                nn.BatchNorm2d(wider),
                nn.ReLU(),
                Residual(wider),
            ]
            width = wider
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(2 * width, out)
        line = torch.linspace(-1, 1, SIZE)
        self.register_buffer(
            "grid", torch.stack([line.expand(SIZE, SIZE), line[:, None].expand(SIZE, SIZE)])[None], persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(torch.cat([x, self.grid.expand(len(x), -1, -1, -1)], 1))
        return self.out(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1))


class Reader(nn.Module):
    """Features -> one set of scores for each field, and the picture's half of the joint embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in FIELDS.items()})
        self.joint = nn.Linear(256, 128)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        features = self.backbone(x)
        h = F.relu(features)
        return features, {name: head(h) for name, head in self.heads.items()}, self.joint(h)


class Words(nn.Module):
    """The sentence's half of the joint embedding: a bag of words and of neighbouring pairs, hashed, then an MLP."""

    BUCKETS = 2048  # the 1,517 words and pairs of 80,000 captions of the world fall into 1,054 of them

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(self.BUCKETS, 96, mode="sum")
        self.mlp = nn.Sequential(nn.Linear(96, 192), nn.ReLU(), nn.Linear(192, 128))

    @classmethod
    def ids(cls, sentence: str) -> list[int]:
        """Bucket numbers of a sentence; CRC32 keeps them the same on every machine."""
        words = re.findall(r"[a-z]+", sentence.lower())
        return [crc32(w.encode()) % cls.BUCKETS for w in [*words, *map(" ".join, pairwise(words))]]

    def forward(self, sentences: Sequence[str]) -> Tensor:
        rows = [self.ids(s) for s in sentences]
        offsets = np.cumsum([0, *map(len, rows)])[:-1]
        flat = torch.tensor([i for row in rows for i in row], dtype=torch.long)
        where = self.table.weight.device
        return self.mlp(self.table(flat.to(where), torch.from_numpy(offsets).to(where)))


class JudgeNet(nn.Module):
    """All weights of the judge in one module; the subject network shares nothing with the reader."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader()
        self.words = Words()
        self.subject = nn.Sequential(Backbone(), nn.ReLU(), nn.Linear(256, 128))


class Judge:
    """The trained judge; every method takes any number of pictures and works in blocks."""

    def __init__(self, net: JudgeNet) -> None:
        self.net = net.float().eval()

    @staticmethod
    def _batches(pictures: Pictures, block: int = 250) -> Iterator[Tensor]:
        if not isinstance(pictures, Tensor):
            pictures = np.asarray(pictures)
            if pictures.ndim != 4 or pictures.shape[1:] != (SIZE, SIZE, 3) or pictures.dtype != np.uint8:
                raise ValueError(
                    f"the judge reads uint8 pictures of shape (N, {SIZE}, {SIZE}, 3), got {pictures.dtype} "
                    f"{pictures.shape}: resize and convert them first"
                )
        for start in range(0, len(pictures), block):
            part = pictures[start : start + block]
            yield part.float() if isinstance(part, Tensor) else to_tensor(np.ascontiguousarray(part))

    @torch.no_grad()
    def _run(self, function: Callable[[Tensor], Tensor], pictures: Pictures) -> Tensor:
        return torch.cat([function(x) for x in self._batches(pictures)])

    @torch.no_grad()
    def read(self, pictures: Pictures) -> dict[str, list[str]]:
        """The most likely value of every field of FIELDS, one a picture."""
        found: dict[str, list[str]] = {name: [] for name in FIELDS}
        for x in self._batches(pictures):
            for name, scores in self.net.reader(x)[1].items():
                found[name] += [FIELDS[name][i] for i in scores.argmax(1).tolist()]
        return found

    def features(self, pictures: Pictures) -> Tensor:
        """[N, 256] features for distances between sets of pictures."""
        return self._run(lambda x: self.net.reader(x)[0], pictures)

    def image_embedding(self, pictures: Pictures) -> Tensor:
        """[N, 128] unit rows to compare with those of captions."""
        return self._run(lambda x: F.normalize(self.net.reader(x)[2], dim=1), pictures)

    @torch.no_grad()
    def text_embedding(self, captions: Sequence[str]) -> Tensor:
        """[N, 128] unit rows to compare with those of pictures."""
        return F.normalize(self.net.words(list(captions)), dim=1)

    def subject_embedding(self, pictures: Pictures) -> Tensor:
        """[N, 128] unit rows; those of one subject have a high cosine."""
        return self._run(lambda x: F.normalize(self.net.subject(x), dim=1), pictures)


def agreement(
    found: Mapping[str, Sequence[str]], scenes: Sequence[Scene], names: Sequence[AbstractSet[str]] | None = None
) -> dict[str, float]:
    """Share of scenes whose fields were read right.

    Args:
        found: what `Judge.read` returned.
        scenes: the truth, in the same order; what a subject's scene lacks never counts.
        names: one set of field names a scene, to count only what its caption said; default: every field.

    Returns:
        Share by field; "triple" is class, colour and background together.
    """
    result: dict[str, float] = {}
    right: dict[str, list[bool]] = {}
    for field in ("kind", "colour", "background", "pattern", "position", "scale", "style"):
        right[field] = [getattr(s, field) == value for s, value in zip(scenes, found[field], strict=True)]
        counted = [
            ok
            for ok, s, i in zip(right[field], scenes, range(len(scenes)), strict=True)
            if getattr(s, field) is not None and (names is None or field == "style" or field in names[i])
        ]
        result[field] = float(np.mean(counted)) if counted else float("nan")
    result["triple"] = float(
        np.mean([all(three) for three in zip(right["kind"], right["colour"], right["background"], strict=True)])
    )
    return result


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance between two sets of features, [N, C] and [M, C]."""
    a, b = a.double(), b.double()
    mean_gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp_min(0).sqrt().sum()
    return float(mean_gap + ca.trace() + cb.trace() - 2 * cross)


def save_judge(net: JudgeNet, folder: Path = JUDGE_WEIGHTS, notes: Mapping[str, Any] | None = None) -> None:
    """Write fp16 weights, and a small JSON of their fields and `notes` on how they were made."""
    from safetensors.torch import save_file

    state = {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in net.state_dict().items()}
    file = written(folder / "judge.safetensors", lambda part: save_file(state, part))
    file.chmod(0o644)  # safetensors makes files that only their owner reads; these are part of a package
    said = {"fields": {k: list(v) for k, v in FIELDS.items()}, **(notes or {})}
    written_text(folder / "judge.json", json.dumps(said, indent=1))


def load_judge(folder: Path = JUDGE_WEIGHTS) -> Judge:
    """The judge that ships with the package, or the one of another folder."""
    from safetensors.torch import load_file

    file = folder / "judge.safetensors"
    if not file.exists():
        fix = "Fix: python -m pcs_trainer.tiny.make.train --cache FOLDER judge"
        raise FileNotFoundError(f"the judge's weights are missing at {file}. {fix}")
    net = JudgeNet()
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(file).items()})
    return Judge(net)
