"""Inputs of one `sample` call: prompts, the concepts that each image has, learned words and their places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..concept.attach import attached
from ..concept.concept import Concept
from ..model.sources import SingleFile, read_json
from ..model.text import Text, Words, encode
from ..model.tokens import tokenize
from ..unet.layers import LowRank
from .stacked import NOBODY, checked_index, stacked, text_side

if TYPE_CHECKING:
    from ..model.model import Model


@dataclass
class Scene:
    """What is drawn: one prompt per image, and the concepts they may use. Made by `make_scene`."""

    model: Model
    prompts: list[str]
    negatives: list[str] | None  # None: no guidance
    concepts: list[Concept]
    strengths: list[float]
    index: list[int] | None  # the concept of each image; None: all concepts on every image
    words: dict[str, list[Tensor]] = field(default_factory=dict)  # learned words beside the concepts' own
    hold_first: bool = False  # the first token's state stays the frozen encoder's, whatever the concepts say
    stacks: list[LowRank] = field(default_factory=list)  # while images are drawn by index

    @contextmanager
    def placed(self) -> Iterator[None]:
        """The concepts on the model, for as long as the context is open."""
        given = dict(self.words)
        if self.index is None:
            with attached(self.model, self.concepts, self.strengths) as learned:
                self.words = learned | given
                yield
        else:
            with stacked(self.model.unet, self.concepts, self.strengths) as self.stacks:
                yield

    def choose(self, pictures: Sequence[int]) -> None:
        """Tell the stacked residuals which concept each image of the next batch has."""
        if self.index is None:
            return
        halves = 1 if self.negatives is None else 2
        for residual in self.stacks:
            count = residual.down.shape[0]  # the last of the stack is for no concept
            chosen = torch.tensor([self.index[i] % count for i in pictures] * halves)
            residual.index = chosen.to(residual.down.device)

    def own(self, i: int) -> list[Concept]:
        """The concepts of image i."""
        if self.index is None:
            return self.concepts
        return [] if self.index[i] == NOBODY else [self.concepts[self.index[i]]]

    def words_of(self, i: int) -> dict[str, list[Tensor]]:
        """The learned words that prompt i may use."""
        if self.index is None:
            return self.words
        return {w: rows for c in self.own(i) for w, rows in c.words.items()} | self.words

    def places(self, i: int, word: str) -> list[int]:
        """Positions of a word in prompt i."""
        sizes = {w: len(rows[0]) for w, rows in self.words_of(i).items()}
        return tokenize(self.model.tokenizer, [self.prompts[i]], sizes).places(0, word)

    def read(self, pictures: Sequence[int]) -> Text:
        """The texts of a batch: its negative prompts, if there is guidance, then its prompts."""
        if self.index is None:
            return self._encoded(pictures, self.words)
        parts: list[tuple[list[int], Text]] = []
        for k in sorted({self.index[i] for i in pictures}):  # concepts may change the text encoder: one at a time
            members = [j for j, i in enumerate(pictures) if self.index[i] == k]
            first = pictures[members[0]]
            sides, strengths = [text_side(c) for c in self.own(first)], [self.strengths[k]] if k != NOBODY else []
            with attached(self.model, sides, strengths):
                parts.append((members, self._encoded([pictures[j] for j in members], self.words_of(first))))
        return _in_order(parts, len(pictures), self.model.unet.attention_names())

    def _encoded(self, pictures: Sequence[int], words: Words) -> Text:
        before = [] if self.negatives is None else [self.negatives[i] for i in pictures]
        hold = self.hold_first or any(c.hold_first for i in pictures for c in self.own(i))
        text = encode(self.model, [*before, *(self.prompts[i] for i in pictures)], words, hold)
        text = text.to(self.model.unet.conv_in.weight)
        if text.pooled is not None and _zeroes_empty_negatives(self.model):
            silent = torch.tensor([j for j, negative in enumerate(before) if not negative], dtype=torch.long)
            for states in text.states.values() if isinstance(text.states, dict) else [text.states]:
                states[silent] = 0
            text.pooled[silent] = 0
        return text


def _zeroes_empty_negatives(model: Model) -> bool:
    """Whether an empty negative prompt is zeros, as in SDXL's pipelines unless their index file says otherwise."""
    index = None if isinstance(model.source, SingleFile) else model.source.root / "model_index.json"
    return index is None or not index.is_file() or read_json(index).get("force_zeros_for_empty_prompt", True)


def _in_order(parts: list[tuple[list[int], Text]], pictures: int, blocks: list[str]) -> Text:
    """Texts that were read in parts, as one batch in the images' order."""
    halves = len(_any_states(parts[0][1])) // len(parts[0][0])
    order, base = [0] * (halves * pictures), 0
    for members, _ in parts:
        for half in range(halves):
            for j in members:
                order[half * pictures + j] = base
                base += 1

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)[order]

    texts = [text for _, text in parts]
    states: Tensor | dict[str, Tensor]
    if any(isinstance(t.states, dict) for t in texts):
        states = {b: joined([t.states[b] if isinstance(t.states, dict) else t.states for t in texts]) for b in blocks}
    else:
        states = joined([t.states for t in texts])
    pooled = None if texts[0].pooled is None else joined([t.pooled for t in texts])
    return Text(states, pooled, texts[0].ids)


def _any_states(text: Text) -> Tensor:
    """The states [B, T, C] of one block, or of all where they share them."""
    return next(iter(text.states.values())) if isinstance(text.states, dict) else text.states


def negative_read(negative: str | Sequence[str] | None, guidance: float | None) -> str | Sequence[str] | None:
    """The negative prompt as `make_scene` takes it: without guidance none is read, right or wrong."""
    return None if guidance == 1 else negative or ""


def make_scene(
    model: Model,
    prompts: str | Sequence[str],
    concepts: Concept | Sequence[Concept],
    strengths: Sequence[float] | None,
    negative: str | Sequence[str] | None,
    index: Sequence[int | None] | Tensor | None,
    words: Words | None,
    hold_first: bool = False,
) -> Scene:
    """The scene of a call's arguments, each checked.

    Args:
        model: draws the images.
        prompts: one, or one per image.
        concepts: the concepts that the images may use, or one.
        strengths: one per concept; default: 1.
        negative: one negative prompt for all, or one per prompt; None: no guidance.
        index: the concept of each prompt (None: none); default: every prompt has all concepts.
        words: learned words beside the concepts', with their token embeddings.
        hold_first: keep the text's first token as the frozen encoder makes it, as concepts that were learned so do.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    concepts = [concepts] if isinstance(concepts, Concept) else list(concepts)
    strengths = [1.0] * len(concepts) if strengths is None else [float(s) for s in strengths]
    if not prompts:
        raise ValueError("prompts is empty: give at least one prompt")
    if len(strengths) != len(concepts):
        raise ValueError(f"{len(concepts)} concepts and {len(strengths)} strengths: give one strength for each concept")
    if isinstance(negative, str):
        negative = [negative] * len(prompts)
    negatives = None if negative is None else list(negative)
    if negatives is not None and len(negatives) != len(prompts):
        raise ValueError(
            f"{len(negatives)} negative prompts and {len(prompts)} prompts: give one for all, or one for each"
        )
    chosen = checked_index(index, len(prompts), concepts)
    given = {word: list(rows) for word, rows in (words or {}).items()}
    return Scene(model, prompts, negatives, concepts, strengths, chosen, given, hold_first)
