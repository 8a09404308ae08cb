"""What the training stages share: a time budget with its learning-rate law, checkpoints written whole, progress."""

import os
import time
from pathlib import Path

import numpy as np
import torch

WEIGHTS = Path(__file__).parent / "weights"
JUDGE_WEIGHTS = Path(__file__).parent / "judge_weights"


def device():
    """The GPU when one is at hand, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Budget:
    """Minutes of training, those of earlier runs included; the learning rate follows the share that is spent."""

    def __init__(self, minutes, spent=0.0, warmup_steps=100, flat_until=0.5):
        self.seconds, self.spent = minutes * 60.0, spent
        self.warmup_steps, self.flat_until = warmup_steps, flat_until
        self._last = time.monotonic()

    def tick(self):
        now = time.monotonic()
        self.spent += now - self._last
        self._last = now

    @property
    def share(self):
        return min(1.0, self.spent / self.seconds)

    @property
    def over(self):
        return self.spent >= self.seconds

    def factor(self, step):
        """Warm up over steps, stay flat, then a half cosine down to 1 % at the end of the budget."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        tail = max(0.0, (self.share - self.flat_until) / (1 - self.flat_until))
        return warm * (0.01 + 0.99 * 0.5 * (1 + float(torch.cos(torch.tensor(tail * torch.pi)))))


class Progress:
    """One line every few seconds: step, loss, samples a second, minutes left."""

    def __init__(self, name, budget, every=20.0, report=print):
        self.name, self.budget, self.every, self.report = name, budget, every, report
        self.started = self.since = time.monotonic()
        self.samples, self.total, self.sums, self.count = 0, 0, {}, 0

    def update(self, step, samples, **values):
        self.samples += samples
        self.count += 1
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value)
        now = time.monotonic()
        if now - self.since < self.every:
            return
        shown = "  ".join(f"{k} {v / self.count:.4f}" for k, v in self.sums.items())
        left = max(0.0, self.budget.seconds - self.budget.spent) / 60
        self.report(
            f"{self.name} step {step}  {shown}  {self.samples / (now - self.since):.0f} samples/s  {left:.1f} min left"
        )
        self.since, self.samples, self.sums, self.count = now, 0, {}, 0


def save_whole(state, path):
    """torch.save to a temporary file beside the target, then one rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def load_checkpoint(path):
    return torch.load(path, map_location="cpu", weights_only=True) if Path(path).exists() else None


def to_tensor(pictures):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_pictures(tensor):
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    return tensor.float().add(1).mul(127.5).round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
