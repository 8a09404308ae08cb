"""Token ids of prompts in which learned words stand, and the places of words among them.

A learned word ("<dog>") is not a token of the tokenizer: its places hold slots, the rows of a table of learned token
embeddings.  Letters: B prompts, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Ids:
    """Token ids [B, T], and slots [B, T]: the row of the learned table that stands at a place, or -1."""

    ids: Tensor
    slots: Tensor
    tokenizer: Any
    spans: dict[str, range]  # a learned word -> its rows in the learned table

    def places(self, i: int, text: str) -> list[int]:
        """Positions of `text` in prompt i: a learned word, or ordinary words with all their tokens."""
        span = self.spans.get(text.lower())
        if span is not None:
            return [j for j, slot in enumerate(self.slots[i].tolist()) if slot in span]
        pieces = plain_ids(self.tokenizer, text)
        row = [-1 if slot >= 0 else t for t, slot in zip(self.ids[i].tolist(), self.slots[i].tolist(), strict=True)]
        starts = [j for j in range(1, len(row) - len(pieces) + 1) if row[j : j + len(pieces)] == pieces]
        return [j + k for j in starts for k in range(len(pieces))] if pieces else []

    def length(self, i: int) -> int:
        """Number of tokens of prompt i up to and including the end token; what follows is padding."""
        ended = (self.ids[i] == self.tokenizer.eos_token_id).nonzero()
        return int(ended[0]) + 1 if len(ended) else self.ids.shape[1]


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without begin and end tokens, however long it is."""
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def _splitter(words: Sequence[str]) -> re.Pattern[str] | None:
    """A pattern of the learned words; one that begins or ends with a letter matches only as a whole word."""

    def guarded(word: str) -> str:
        left, right = r"(?<!\w)" * word[0].isalnum(), r"(?!\w)" * word[-1].isalnum()
        return left + re.escape(word) + right

    longest_first = sorted(words, key=len, reverse=True)  # "<dog2>" before "<dog", which would match within it
    return re.compile("(" + "|".join(map(guarded, longest_first)) + ")", re.IGNORECASE) if words else None


def tokenize(tokenizer: Any, prompts: Sequence[str], words: Mapping[str, int] | None = None) -> Ids:
    """Token ids of prompts, with slots where a learned word stands.

    Args:
        tokenizer: transformers' CLIP tokenizer.
        prompts: the texts; what exceeds the tokenizer's length is cut.
        words: learned word -> number of its token embeddings.

    Returns:
        Ids and slots [B, T] of the tokenizer's full length.
    """
    spans = _spans(words)
    split = _splitter(list(spans))
    room = tokenizer.model_max_length
    first, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = torch.full((len(prompts), room), end if pad is None else pad, dtype=torch.long)  # [B, T]
    slots = torch.full_like(ids, -1)  # [B, T]
    for i, prompt in enumerate(prompts):
        row = [(first, -1), *_row(tokenizer, prompt, split, spans)[: room - 2], (end, -1)]
        ids[i, : len(row)], slots[i, : len(row)] = torch.tensor(row).T
    return Ids(ids, slots, tokenizer, spans)


def has_word(text: str, word: str) -> bool:
    """Whether a text has a word by itself, not within a longer one; capitals count as small letters."""
    pattern = _splitter([word]) if word else None
    return pattern is not None and pattern.search(text) is not None


def with_word(text: str, old: str, new: str) -> str:
    """A text with another word in place of `old`, wherever that stands by itself."""
    pattern = _splitter([old]) if old else None
    return text if pattern is None else pattern.sub(lambda _: new, text)


def cut_off(tokenizer: Any, prompt: str, words: Mapping[str, int], word: str) -> tuple[int, bool]:
    """What the tokenizer's length takes from a prompt.

    Args:
        tokenizer: transformers' CLIP tokenizer.
        prompt: the text.
        words: learned word -> number of its token embeddings.
        word: of the prompt, learned or ordinary.

    Returns:
        How many tokens are cut off, and whether the prompt has `word`, but no longer as a whole.
    """
    spans = _spans(words)
    row, room = _row(tokenizer, prompt, _splitter(list(spans)), spans), tokenizer.model_max_length - 2
    if len(row) <= room:
        return 0, False
    span = spans.get(word.lower())
    own = [(0, slot) for slot in span] if span else [(t, -1) for t in plain_ids(tokenizer, word)]
    ends = [j + len(own) for j in range(len(row) - len(own) + 1) if row[j : j + len(own)] == own]
    return len(row) - room, bool(own and ends) and ends[0] > room


def _spans(words: Mapping[str, int] | None) -> dict[str, range]:
    """Each learned word's rows in the learned table."""
    spans, start = {}, 0
    for word, count in (words or {}).items():
        spans[word.lower()] = range(start, start + count)
        start += count
    return spans


def _row(
    tokenizer: Any, prompt: str, split: re.Pattern[str] | None, spans: Mapping[str, range]
) -> list[tuple[int, int]]:
    """(token id, slot) at each place of a prompt, without begin and end tokens and however long it is."""
    row: list[tuple[int, int]] = []
    for part in split.split(prompt) if split else [prompt]:
        span = spans.get(part.lower())
        row += [(0, slot) for slot in span] if span is not None else [(t, -1) for t in plain_ids(tokenizer, part)]
    return row
