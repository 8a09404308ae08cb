"""The judge: small networks, trained apart from the model, that read pictures of the tiny world.

    judge = load_judge()
    judge.read(pictures)               -> {"kind": [...], "colour": [...], "background": [...], ...}
    judge.subject_embedding(pictures)  -> (N, 128) unit rows: same subject, high cosine (the part of DINO)
    judge.image_embedding(pictures), judge.text_embedding(captions) -> (N, 128) unit rows (the part of CLIP)
    judge.features(pictures)           -> (N, 256) for distances between sets of pictures (the part of Inception)

Pictures are uint8 (N, 64, 64, 3) arrays, lists of such, or float tensors (N, 3, 64, 64) in [-1, 1].
"""

import json
import re
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .common import JUDGE_WEIGHTS, to_tensor
from .world import BACKGROUNDS, CLASSES, COLOURS, LIGHTS, PATTERNS, POSITIONS, SCALES, SIZE, STYLES

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

    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Backbone(nn.Module):
    """64x64 picture (and the coordinates of its pixels) -> 256 features."""

    def __init__(self, widths=(24, 48, 96, 160), out=256):
        super().__init__()
        layers, width = [], 5
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

    def forward(self, x):
        h = self.layers(torch.cat([x, self.grid.expand(len(x), -1, -1, -1)], 1))
        return self.out(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1))


class Reader(nn.Module):
    """Features -> one set of scores for each field, and the picture's half of the joint embedding."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in FIELDS.items()})
        self.joint = nn.Linear(256, 128)

    def forward(self, x):
        features = self.backbone(x)
        h = F.relu(features)
        return features, {name: head(h) for name, head in self.heads.items()}, self.joint(h)


class Words(nn.Module):
    """The sentence's half of the joint embedding: a bag of words and of neighbouring pairs, hashed, then an MLP."""

    BUCKETS = 2048

    def __init__(self):
        super().__init__()
        self.table = nn.EmbeddingBag(self.BUCKETS, 96, mode="sum")
        self.mlp = nn.Sequential(nn.Linear(96, 192), nn.ReLU(), nn.Linear(192, 128))

    @classmethod
    def ids(cls, sentence):
        """Bucket numbers of a sentence; CRC32 keeps them the same on every machine."""
        from zlib import crc32

        words = re.findall(r"[a-z]+", sentence.lower())
        return [crc32(w.encode()) % cls.BUCKETS for w in [*words, *map(" ".join, pairwise(words))]]

    def forward(self, sentences):
        rows = [self.ids(s) for s in sentences]
        offsets = np.cumsum([0, *map(len, rows)])[:-1]
        flat = torch.tensor([i for row in rows for i in row], dtype=torch.long)
        where = self.table.weight.device
        return self.mlp(self.table(flat.to(where), torch.from_numpy(offsets).to(where)))


class JudgeNet(nn.Module):
    """All weights of the judge in one module; the subject network shares nothing with the reader."""

    def __init__(self):
        super().__init__()
        self.reader = Reader()
        self.words = Words()
        self.subject = nn.Sequential(Backbone(), nn.ReLU(), nn.Linear(256, 128))


class Judge:
    """The trained judge; every method takes any number of pictures and works in blocks."""

    def __init__(self, net):
        self.net = net.float().eval()

    @staticmethod
    def _batches(pictures, block=250):
        if not isinstance(pictures, torch.Tensor):
            pictures = np.asarray(pictures)
            if pictures.ndim != 4 or pictures.shape[1:] != (SIZE, SIZE, 3) or pictures.dtype != np.uint8:
                raise ValueError(
                    f"the judge reads uint8 pictures of shape (N, {SIZE}, {SIZE}, 3), got {pictures.dtype} "
                    f"{pictures.shape}: resize and convert them first"
                )
        for start in range(0, len(pictures), block):
            part = pictures[start : start + block]
            yield part.float() if isinstance(part, torch.Tensor) else to_tensor(np.ascontiguousarray(part))

    @torch.no_grad()
    def _run(self, function, pictures):
        return torch.cat([function(x) for x in self._batches(pictures)])

    @torch.no_grad()
    def read(self, pictures):
        """The most likely value of every field, one list a field."""
        found = {name: [] for name in FIELDS}
        for x in self._batches(pictures):
            for name, scores in self.net.reader(x)[1].items():
                found[name] += [FIELDS[name][i] for i in scores.argmax(1).tolist()]
        return found

    def features(self, pictures):
        return self._run(lambda x: self.net.reader(x)[0], pictures)

    def image_embedding(self, pictures):
        return self._run(lambda x: F.normalize(self.net.reader(x)[2], dim=1), pictures)

    @torch.no_grad()
    def text_embedding(self, captions):
        return F.normalize(self.net.words(list(captions)), dim=1)

    def subject_embedding(self, pictures):
        return self._run(lambda x: F.normalize(self.net.subject(x), dim=1), pictures)


def agreement(found, scenes, names=None):
    """Share of scenes whose fields were read right, by field; ``triple`` is class, colour and background together.

    ``names`` (one set of field names a scene) counts only what the caption said; what a subject lacks never counts.
    """
    result, right = {}, {}
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


def frechet(a, b):
    """Squared Frechet distance between two sets of features, (N, C) and (M, C)."""
    a, b = a.double(), b.double()
    mean_gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp_min(0).sqrt().sum()
    return float(mean_gap + ca.trace() + cb.trace() - 2 * cross)


def save_judge(net, folder=JUDGE_WEIGHTS, notes=None):
    """fp16 weights and a small JSON of how they were made."""
    import os

    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in net.state_dict().items()}
    save_file(state, folder / "judge.part")
    os.replace(folder / "judge.part", folder / "judge.safetensors")
    (folder / "judge.safetensors").chmod(0o644)
    (folder / "judge.json").write_text(
        json.dumps({"fields": {k: list(v) for k, v in FIELDS.items()}, **(notes or {})}, indent=1)
    )


def load_judge(folder=JUDGE_WEIGHTS):
    """The judge that ships with the package."""
    from safetensors.torch import load_file

    file = folder / "judge.safetensors"
    if not file.exists():
        raise FileNotFoundError(
            f"the judge's weights are missing at {file}: run python -m pcs_trainer.tiny.make.train judge"
        )
    net = JudgeNet()
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(file).items()})
    return Judge(net)
