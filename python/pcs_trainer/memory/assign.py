"""Choosing a memory plan for each layer: the least work within a limit.

The backward visits the layers in reverse. While it is in layer i, what all layers up to i keep is alive, and what layer
i's own backward adds; so a layer that runs early burdens every later one, and the peak is the largest of these moments.
"""

from __future__ import annotations

import numpy as np

from .ledger import StepCount


class Table:
    """Each layer's bytes and work under each plan [layers, plans], from one count a plan."""

    def __init__(self, counts: dict[str, StepCount], lasting: int) -> None:
        self.plans = list(counts)
        self.names = list(next(iter(counts.values())).layers)
        layers = [[count.layers[name] for count in counts.values()] for name in self.names]
        self.kept = np.array([[layer.kept for layer in row] for row in layers], dtype=np.float64)
        self.inside = np.array([[layer.inside for layer in row] for row in layers], dtype=np.float64)
        self.work = np.array([[layer.work for layer in row] for row in layers], dtype=np.float64)
        self.lasting = lasting
        self.head = max(count.head for count in counts.values())
        self.rows = np.arange(len(self.names))

    def moments(self, choice: np.ndarray) -> np.ndarray:
        """Bytes alive while the backward is in each layer, in the order of the layers; last, before it is in any."""
        kept = self.lasting + np.cumsum(self.kept[self.rows, choice])
        return np.append(kept + self.inside[self.rows, choice], kept[-1] + self.head)

    def gains(self, choice: np.ndarray, limit: float) -> np.ndarray:
        """[layers, plans]: by how much one change lowers the bytes over the limit, summed over the moments."""
        now = self.moments(choice)
        more_kept = self.kept - self.kept[self.rows, choice][:, None]
        more_inside = self.inside - self.inside[self.rows, choice][:, None]
        later = np.arange(len(now))[None, :] >= self.rows[:, None]  # [layers, moments]
        after = now[None, None, :] + more_kept[:, :, None] * later[:, None, :]
        after[self.rows, :, self.rows] += more_inside
        return np.maximum(now - limit, 0).sum() - np.maximum(after - limit, 0).sum(axis=2)

    def fastest(self) -> np.ndarray:
        """The plan of the least work for each layer; of equals the one that keeps less, then the first."""
        least = self.work <= self.work.min(axis=1, keepdims=True)
        return np.where(least, self.kept, np.inf).argmin(axis=1)

    def named(self, choice: np.ndarray) -> dict[str, str]:
        return {name: self.plans[c] for name, c in zip(self.names, choice, strict=True)}


def fastest(table: Table) -> dict[str, str]:
    """The cheapest plan of each layer, by the table."""
    return table.named(table.fastest())


def _within(table: Table, limit: float) -> np.ndarray | None:
    """Change one layer at a time, the one that takes most off the excess for its work; undo what was not needed."""
    choice = table.fastest()
    while (table.moments(choice) > limit).any():
        gains = table.gains(choice, limit)
        price = np.maximum(table.work - table.work[table.rows, choice][:, None], 1.0)
        worth = np.where(gains > 0, gains / price, 0.0)
        layer, plan = np.unravel_index(worth.argmax(), worth.shape)
        if worth[layer, plan] <= 0:
            return None
        choice[layer] = plan
    for layer in table.rows:
        for plan in np.argsort(table.work[layer], kind="stable"):
            if table.work[layer, plan] >= table.work[layer, choice[layer]]:
                break
            tried = choice.copy()
            tried[layer] = plan
            if (table.moments(tried) <= limit).all():
                choice = tried
                break
    return choice


def fastest_within(table: Table, limit: float) -> dict[str, str] | None:
    """The least work within the limit, by the table; None where nothing is."""
    choice = _within(table, limit)
    return None if choice is None else table.named(choice)


def smallest(table: Table) -> dict[str, str]:
    """About the least bytes that any assignment reaches, by bisection."""
    found = table.fastest()
    low, high = float(table.lasting), table.moments(found).max()
    for _ in range(10):
        middle = (low + high) / 2
        choice = _within(table, middle)
        if choice is None:
            low = middle
        else:
            found, high = choice, table.moments(choice).max()
    return table.named(found)
