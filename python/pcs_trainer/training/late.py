"""Numbers that the device makes, read a step after they were asked for: the host never waits for a step's work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

Then = Callable[[list[float]], None]


class Late:
    """Numbers on their way to the host, with what is done with them there.

    On the CPU nothing is waited for, and they are read at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.behind = 0 if device.type == "cpu" else 1  # steps
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None, Then]] = deque()

    def ask(self, numbers: Tensor, then: Then) -> None:
        """Send numbers [n] to the host, where `then` is called with them; a graph may write to them again at once."""
        if numbers.device.type != "cuda":
            self._waiting.append((numbers.clone(), None, then))
            return
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._waiting.append((host, arrived, then))

    def read(self, all_of_them: bool = False) -> None:
        """Do what is to be done with the numbers of all but the last step, or of all."""
        while len(self._waiting) > (0 if all_of_them else self.behind):
            numbers, arrived, then = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            then(numbers.tolist())

    def forget(self) -> None:
        """Let go of what has not been read."""
        self._waiting.clear()
