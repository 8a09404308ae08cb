"""Stage 2: the judge, on pictures that the model never sees.

The reader learns every field by cross-entropy and the joint embedding by a symmetric contrastive loss; the subject
network learns to tell subjects apart, two photographs of each a batch, every other batch of few classes so that class
alone does not help.
"""

import numpy as np
import torch
import torch.nn.functional as F

from .. import captions, world
from ..common import Budget, Progress, device, load_checkpoint, save_whole, to_tensor
from ..judge import FIELDS, JudgeNet
from ..subjects import subject
from ..training_set import JUDGE_SEEDS

UNNAMED = -100  # cross-entropy's ignored label: a subject has no colour and no pattern


def judge_scene(index):
    """Scenes for the reader: one in seven a subject, held-out triples included."""
    rng = np.random.default_rng([JUDGE_SEEDS, index])
    seed = JUDGE_SEEDS + index
    if rng.random() < 0.15:
        one = subject(seed)
        return world.with_look(world.scene(seed, kind=one.kind), one.look)
    return world.scene(seed)


def labels(scene):
    return [UNNAMED if getattr(scene, f) is None else values.index(getattr(scene, f)) for f, values in FIELDS.items()]


def reader_example(index):
    s = judge_scene(index)
    said = captions.caption(s, np.random.default_rng([JUDGE_SEEDS, index, 3])).text
    return world.render(s), labels(s), said


def identity(number, classes):
    """A look to recognise: a subject, or one time in six an ordinary coloured object."""
    rng = np.random.default_rng([JUDGE_SEEDS, number, 17])
    kind = str(rng.choice(classes))
    if rng.random() < 1 / 6:
        return kind, world.scene(JUDGE_SEEDS + number, kind=kind).look
    return kind, subject(JUDGE_SEEDS + number, kind).look


def pair_example(number, classes, shots=2):
    """Photographs of one identity in different places, poses, sizes and light."""
    kind, look = identity(number, classes)
    seeds = np.random.default_rng([JUDGE_SEEDS, number, 19]).integers(0, 2**31, shots)
    return np.stack([world.render(world.with_look(world.scene(int(s), kind=kind, style="photo"), look)) for s in seeds])


def disturb(x, generator):
    """What a generated picture may suffer from: blur, noise, a wrong exposure, a shift of a few pixels."""
    n = len(x)
    blur = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = torch.rand(n, 1, 1, 1, generator=generator) * (torch.rand(n, 1, 1, 1, generator=generator) < 0.5)
    x = x + amount * (blur - x)
    x = x * (1 + 0.12 * torch.randn(n, 1, 1, 1, generator=generator)) + 0.06 * torch.randn(
        n, 3, 1, 1, generator=generator
    )
    x = x + 0.06 * torch.rand(n, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    dx, dy = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return torch.roll(F.pad(x, (2, 2, 2, 2), mode="replicate"), (dy, dx), (2, 3))[..., 2:-2, 2:-2].clamp(-1.1, 1.1)


def contrast(a, b, temperature):
    """Symmetric InfoNCE of matching rows."""
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
    target = torch.arange(len(a), device=a.device)
    return 0.5 * (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target))


class Stream:
    """Fresh examples made by a worker process a few batches ahead; a batch is never seen twice."""

    def __init__(self, make, first):
        from concurrent.futures import ProcessPoolExecutor

        self.pool, self.make, self.next = ProcessPoolExecutor(1), make, first
        self.ahead = [self.pool.submit(make, first + i) for i in range(4)]

    def batch(self):
        self.next += 1
        self.ahead.append(self.pool.submit(self.make, self.next + 3))
        return self.ahead.pop(0).result()

    def close(self):
        self.pool.shutdown(cancel_futures=True)


def reader_batch(number, size=128):
    examples = [reader_example(number * size + i) for i in range(size)]
    return np.stack([e[0] for e in examples]), np.array([e[1] for e in examples]), [e[2] for e in examples]


def subject_batch(number, size=96):
    few = 3 if number % 2 else len(world.CLASSES)
    classes = np.random.default_rng([JUDGE_SEEDS, number, 23]).choice(world.CLASSES, few, replace=False)
    return np.stack([pair_example(number * size + i, classes) for i in range(size)])


def reader_loss(net, batch, generator):
    pictures, truth, said = batch
    _, scores, image = net.reader(disturb(to_tensor(pictures), generator).to(device()))
    truth = torch.from_numpy(truth).to(device())
    fields = sum(F.cross_entropy(scores[f], truth[:, i], ignore_index=UNNAMED) for i, f in enumerate(FIELDS))
    return fields + 0.5 * contrast(image, net.words(said), 0.07)


def subject_loss(net, batch, generator):
    x = disturb(to_tensor(batch.reshape(-1, *batch.shape[2:])), generator)
    h = net.subject(x.to(device()))
    return contrast(h[0::2], h[1::2], 0.08)


def train_part(name, net, parts, loss_of, make, cache, minutes, lr, report):
    """Train some parts of the judge on a stream of fresh pictures, resumable."""
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
        if budget.spent - saved > 60 or budget.over:
            saved = budget.spent
            save_whole(
                {
                    "parts": [p.state_dict() for p in parts],
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "spent": budget.spent,
                },
                file,
            )
    stream.close()


def train_judge(cache, minutes, lr=3e-3, seed=1, report=print):
    """Half of the time for the reader, half for the subject network; returns the trained JudgeNet."""
    torch.manual_seed(seed)
    net = JudgeNet().train().to(device())
    train_part("reader", net, [net.reader, net.words], reader_loss, reader_batch, cache, minutes / 2, lr, report)
    train_part("subject", net, [net.subject], subject_loss, subject_batch, cache, minutes / 2, lr, report)
    return net.cpu()
