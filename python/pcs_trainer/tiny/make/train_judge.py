"""Stage 2: the judge, on pictures that the model never sees.

The reader learns every field by cross-entropy and the joint embedding by a symmetric contrastive loss; the subject
network learns to tell subjects apart, two photographs of each a batch, every other batch of few classes so that class
alone does not help.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import captions, world
from ..common import to_tensor
from ..judge import FIELDS, JudgeNet
from ..subjects import subject
from ..training_set import JUDGE_SEEDS
from .budget import Budget, Progress, device, load_checkpoint, save_checkpoint

Bytes: TypeAlias = NDArray[np.uint8]
ReaderBatch: TypeAlias = tuple[Bytes, NDArray[np.int64], list[str]]  # pictures, labels by field, captions

UNNAMED = -100  # cross-entropy's ignored label: a subject has no colour and no pattern
SAVE_EVERY = 60.0  # seconds of training that a kill may lose
# Random streams of the judge's seeds, apart from the scenes' own.
CAPTIONS, IDENTITIES, SHOTS, CLASSES_OF_A_BATCH = 3, 17, 19, 23


def judge_scene(index: int) -> world.Scene:
    """A scene for the reader: one in seven a subject, held-out triples included."""
    rng = np.random.default_rng([JUDGE_SEEDS, index])
    seed = JUDGE_SEEDS + index
    if rng.random() < 0.15:
        one = subject(seed)
        return world.with_look(world.scene(seed, kind=one.kind), one.look)
    return world.scene(seed)


def labels(scene: world.Scene) -> list[int]:
    """The number of each field's value, in the order of FIELDS."""
    return [UNNAMED if getattr(scene, f) is None else values.index(getattr(scene, f)) for f, values in FIELDS.items()]


def reader_example(index: int) -> tuple[Bytes, list[int], str]:
    """A picture, its labels and a caption."""
    s = judge_scene(index)
    said = captions.caption(s, np.random.default_rng([JUDGE_SEEDS, index, CAPTIONS])).text
    return world.render(s), labels(s), said


def identity(number: int, classes: Sequence[str]) -> tuple[str, world.Look]:
    """A look to recognise: a subject, or one time in six an ordinary coloured object."""
    rng = np.random.default_rng([JUDGE_SEEDS, number, IDENTITIES])
    kind = str(rng.choice(classes))
    if rng.random() < 1 / 6:
        return kind, world.scene(JUDGE_SEEDS + number, kind=kind).look
    return kind, subject(JUDGE_SEEDS + number, kind).look


def pair_example(number: int, classes: Sequence[str], shots: int = 2) -> Bytes:
    """Photographs [shots, H, W, 3] of one identity in different places, poses, sizes and light."""
    kind, look = identity(number, classes)
    seeds = np.random.default_rng([JUDGE_SEEDS, number, SHOTS]).integers(0, 2**31, shots)
    return np.stack([world.render(world.with_look(world.scene(int(s), kind=kind, style="photo"), look)) for s in seeds])


def disturb(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures with what generated ones may suffer from: blur, noise, a wrong exposure, a shift of a few pixels."""
    n = len(x)
    blur = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = torch.rand(n, 1, 1, 1, generator=generator) * (torch.rand(n, 1, 1, 1, generator=generator) < 0.5)
    x = x + amount * (blur - x)
    exposure = 1 + 0.12 * torch.randn(n, 1, 1, 1, generator=generator)
    x = x * exposure + 0.06 * torch.randn(n, 3, 1, 1, generator=generator)
    x = x + 0.06 * torch.rand(n, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    dx, dy = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return torch.roll(F.pad(x, (2, 2, 2, 2), mode="replicate"), (dy, dx), (2, 3))[..., 2:-2, 2:-2].clamp(-1.1, 1.1)


def contrast(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE of matching rows."""
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
    target = torch.arange(len(a), device=a.device)
    return 0.5 * (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target))


class Stream:
    """Fresh examples made by a worker process a few batches ahead; a batch is never seen twice."""

    def __init__(self, make: Callable[[int], Any], first: int) -> None:
        self.pool, self.make, self.next = ProcessPoolExecutor(1), make, first
        self.ahead: list[Future[Any]] = [self.pool.submit(make, first + i) for i in range(4)]

    def batch(self) -> Any:
        """The next batch, and one more ordered."""
        self.next += 1
        self.ahead.append(self.pool.submit(self.make, self.next + 3))
        return self.ahead.pop(0).result()

    def close(self) -> None:
        """End the worker process."""
        self.pool.shutdown(cancel_futures=True)


def reader_batch(number: int, size: int = 128) -> ReaderBatch:
    """Batch `number` of the reader."""
    examples = [reader_example(number * size + i) for i in range(size)]
    return np.stack([e[0] for e in examples]), np.array([e[1] for e in examples]), [e[2] for e in examples]


def subject_batch(number: int, size: int = 96) -> Bytes:
    """Batch `number` of the subject network: two photographs of each subject, [size, 2, H, W, 3]."""
    few = 3 if number % 2 else len(world.CLASSES)  # among few classes, the class alone does not tell subjects apart
    rng = np.random.default_rng([JUDGE_SEEDS, number, CLASSES_OF_A_BATCH])
    classes = [str(name) for name in rng.choice(world.CLASSES, few, replace=False)]
    return np.stack([pair_example(number * size + i, classes) for i in range(size)])


def reader_loss(net: JudgeNet, batch: ReaderBatch, generator: torch.Generator) -> Tensor:
    """Cross-entropy of every field, and half the contrastive loss of pictures and captions."""
    pictures, labelled, said = batch
    _, scores, image = net.reader(disturb(to_tensor(pictures), generator).to(device()))
    truth = torch.from_numpy(labelled).to(device())
    by_field = (F.cross_entropy(scores[f], truth[:, i], ignore_index=UNNAMED) for i, f in enumerate(FIELDS))
    return sum(by_field, start=torch.zeros(())) + 0.5 * contrast(image, net.words(said), 0.07)


def subject_loss(net: JudgeNet, batch: Bytes, generator: torch.Generator) -> Tensor:
    """Contrastive loss of the two photographs of each subject."""
    x = disturb(to_tensor(batch.reshape(-1, *batch.shape[2:])), generator)
    h = net.subject(x.to(device()))
    return contrast(h[0::2], h[1::2], 0.08)


def train_part(
    name: str,
    net: JudgeNet,
    parts: Sequence[nn.Module],
    loss_of: Callable[[JudgeNet, Any, torch.Generator], Tensor],
    make: Callable[[int], Any],
    cache: str | Path,
    minutes: float,
    lr: float,
    report: Callable[[str], object],
) -> None:
    """Train some parts of the judge on a stream of fresh pictures, or resume it.

    Args:
        name: of the checkpoint, judge-{name}.ckpt.
        net: the judge.
        parts: modules of it that train.
        loss_of: (net, batch, generator) -> loss.
        make: number -> batch, called in another process.
        cache: folder of the checkpoint.
        minutes: training time, that of earlier runs included.
        lr: learning rate after the warm-up.
        report: told of the progress.
    """
    file = f"{cache}/judge-{name}.ckpt"
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2)
    step, spent = 0, 0.0
    if state := load_checkpoint(file):
        for part, weights in zip(parts, state["parts"], strict=True):
            part.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    budget = Budget(minutes, spent, flat_until=0.3)
    progress, saved, stream = Progress(f"judge {name}", budget, report=report), spent, Stream(make, step)
    generator = torch.Generator().manual_seed(step + 1)
    while not budget.over:
        batch = stream.batch()
        loss = loss_of(net, batch, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * budget.factor(step)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        budget.tick()
        progress.update(step, len(batch[0]) if isinstance(batch, tuple) else 2 * len(batch), loss=loss.item())
        if budget.spent - saved > SAVE_EVERY or budget.over:
            saved = budget.spent
            kept = {"parts": [p.state_dict() for p in parts], "optimizer": optimizer.state_dict()}
            save_checkpoint({**kept, "step": step, "spent": budget.spent}, file)
    stream.close()


def train_judge(
    cache: str | Path,
    minutes: float,
    lr: float = 3e-3,
    seed: int = 1,
    report: Callable[[str], object] = print,
) -> JudgeNet:
    """Train the judge, or resume it: half of the time for the reader, half for the subject network.

    Args:
        cache: folder of the checkpoints.
        minutes: training time, that of earlier runs included.
        lr: learning rate after the warm-up.
        seed: of the first weights.
        report: told of the progress.
    """
    torch.manual_seed(seed)
    net = JudgeNet().train().to(device())
    train_part("reader", net, [net.reader, net.words], reader_loss, reader_batch, cache, minutes / 2, lr, report)
    train_part("subject", net, [net.subject], subject_loss, subject_batch, cache, minutes / 2, lr, report)
    return net.cpu()
