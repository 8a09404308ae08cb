"""What a demo samples, and what it has made so far."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...evaluation.prompts import Ask
from ...methods import TITLES
from ...units import time_text
from ..interrupt import Stopped
from ..progress import Progress
from . import DEFAULT_METHODS

if TYPE_CHECKING:
    from ...concept.concept import Concept

BASE = "Base model"
# What is sampled, and what the judge has to see in it.
PROMPTS = (
    Ask("a photo of a {}", "plain"),
    Ask("a {} on the beach", "background", (("background", "beach"),)),
    Ask("a {} underwater", "background", (("background", "underwater"),)),
    Ask("a {} in the snow", "background", (("background", "snow"),)),
    Ask("a {} in front of a brick wall", "background", (("background", "brick"),)),
    Ask("a painting of a {} at night", "painting", (("background", "night"), ("style", "painting"))),
)


def with_lag(method: str) -> str:
    """The column of a method's images that were sampled with LAG."""
    return f"{TITLES[method]} with LAG"


@dataclass
class Column:
    """One model's images: `each` of every prompt, prompt by prompt, and the attention maps of one of them."""

    name: str
    pictures: list[Any]
    maps: list[Any]
    concept: Concept | None = None


@dataclass
class Demo:
    """What the demo is to do, and what it has made so far.

    Args:
        out: its folder.
        class_word: what the photos show.
        effort: share of the training steps and of the images.
        methods: names in TITLES, in the report's order.
    """

    out: Path
    class_word: str
    effort: float
    progress: Progress
    should_stop: Callable[[], bool]
    methods: Sequence[str] = DEFAULT_METHODS
    photos: list[Any] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    proofs: list[dict[str, Any]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    report: Path = Path()

    @property
    def each(self) -> int:
        """Images per prompt that the scores are computed from; the sheets show the first."""
        return max(1, round(4 * self.effort))

    @property
    def sampling_steps(self) -> int:
        """25 as elsewhere; few where the demo is only to run through."""
        return 25 if self.effort >= 0.3 else 8

    @contextmanager
    def piece(self, name: str) -> Iterator[None]:
        """A part of the demo, timed; one that fails is named and the rest goes on."""
        if self.should_stop():
            raise Stopped
        self.progress.label = name
        started = time.monotonic()
        try:
            yield
        except (Stopped, KeyboardInterrupt):
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self.failures.append(f"{name} failed: {reason}")
            self.progress.say(f"{name} failed: {reason}")
            with (self.out / "failures.txt").open("a", encoding="utf-8") as log:
                log.write(f"{name}\n{traceback.format_exc()}\n")
        finally:
            seconds = time.monotonic() - started
            self.timings.append({"name": name, "seconds": seconds})
        self.progress.say(f"{name}: {time_text(seconds)}")
