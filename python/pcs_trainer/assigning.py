"""Choosing a memory plan for each layer: the least work within a limit.

The backward visits the layers in reverse. While it is in layer i, what all layers up to i keep is alive, and what layer
i's own backward adds; so a layer that runs early burdens every later one, and the peak is the largest of these sums.
"""

from __future__ import annotations

from itertools import accumulate

from .counting import StepCount

Choice = list[str]  # a plan for each layer


class Table:
    """Each layer's bytes and work under each plan, from one count a plan."""

    def __init__(self, counts: dict[str, StepCount], lasting: int) -> None:
        self.plans = list(counts)
        self.names = list(next(iter(counts.values())).layers)
        self.layers = [{plan: count.layers[name] for plan, count in counts.items()} for name in self.names]
        self.lasting = lasting
        self.head = max(count.head for count in counts.values())

    def moments(self, choice: Choice) -> list[int]:
        """Bytes alive while the backward is in each layer, in the order of the layers; last, before it is in any."""
        chosen = [layer[plan] for layer, plan in zip(self.layers, choice, strict=True)]
        kept = list(accumulate(layer.kept for layer in chosen))
        inside = [self.lasting + k + layer.inside for k, layer in zip(kept, chosen, strict=True)]
        return [*inside, self.lasting + (kept[-1] if kept else 0) + self.head]

    def named(self, choice: Choice) -> dict[str, str]:
        return dict(zip(self.names, choice, strict=True))

    def fastest(self) -> Choice:
        return [min(self.plans, key=lambda p: (layer[p].work, layer[p].kept)) for layer in self.layers]


def fastest(table: Table) -> dict[str, str]:
    return table.named(table.fastest())


def _excess(moments: list[int], limit: int) -> int:
    return sum(max(0, m - limit) for m in moments)


def _within(table: Table, limit: int) -> Choice | None:
    """Change one layer at a time, the one that takes most off the excess for its work; undo what was not needed."""
    choice = table.fastest()
    while (excess := _excess(table.moments(choice), limit)) > 0:
        best: tuple[float, int, str] | None = None
        for i, layer in enumerate(table.layers):
            for plan in table.plans:
                if layer[plan].kept >= layer[choice[i]].kept and layer[plan].inside >= layer[choice[i]].inside:
                    continue
                gain = excess - _excess(table.moments([*choice[:i], plan, *choice[i + 1 :]]), limit)
                price = max(layer[plan].work - layer[choice[i]].work, 1.0)
                if gain > 0 and (best is None or gain / price > best[0]):
                    best = gain / price, i, plan
        if best is None:
            return None
        choice[best[1]] = best[2]
    for i, layer in enumerate(table.layers):
        for plan in sorted(table.plans, key=lambda p: layer[p].work):
            if layer[plan].work >= layer[choice[i]].work:
                break
            tried = [*choice[:i], plan, *choice[i + 1 :]]
            if _excess(table.moments(tried), limit) == 0:
                choice = tried
                break
    return choice


def fastest_within(table: Table, limit: int) -> dict[str, str] | None:
    """The least work within the limit, by the table; None where nothing is."""
    choice = _within(table, limit)
    return None if choice is None else table.named(choice)


def smallest(table: Table) -> dict[str, str]:
    """About the least bytes that any assignment reaches, by bisection."""
    found = table.fastest()
    low, high = table.lasting, max(table.moments(found))
    for _ in range(8):
        middle = (low + high) // 2
        choice = _within(table, middle)
        if choice is None:
            low = middle
        else:
            found, high = choice, max(table.moments(choice))
    return table.named(found)
