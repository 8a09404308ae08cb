"""Words for subjects: rare tokens of a tokenizer, a learned word's first rows, prompts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..concept.concept import subject_words
from ..model.tokens import plain_ids

if TYPE_CHECKING:
    from ..model.model import Model
    from ..settings import Settings


def rare_tokens(tokenizer: Any) -> list[str]:
    """Words that are one late, short, meaningless-looking entry of the vocabulary, the rarest first.

    Merges are learned from frequent to rare, so a late entry is a rare one (DreamBooth draws T5's ids 5000-10000).
    """
    vocabulary = tokenizer.get_vocab()
    short = [(i, t[:-4]) for t, i in vocabulary.items() if t.endswith("</w>") and re.fullmatch(r"[a-z]{3}</w>", t)]
    consonants = [(i, t) for i, t in short if not re.search("[aeiouy]", t)]
    found = [t for _, t in sorted(consonants or short, reverse=True)]
    return [t for t in found if len(plain_ids(tokenizer, t)) == 1]


def rare_token(tokenizer: Any, seed: int = 0) -> str:
    """One of the hundred rarest short words of a tokenizer."""
    found = rare_tokens(tokenizer)[:100]
    if not found:
        raise ValueError("this tokenizer has no rare short word; name one with token=..., or use identifier='learned'")
    return found[seed % len(found)]


def choose_token(model: Model, s: Settings) -> Settings:
    """Settle what names the subject; a learned word must not be a word already."""
    from dataclasses import replace

    tokenizer = model.tokenizers[0]
    if s.identifier == "plain":
        return s
    if s.identifier == "rare":
        if not s.token:
            return replace(s, token=rare_token(tokenizer, s.seed))
        if len(plain_ids(tokenizer, s.token)) == 1:
            return s
        # A word of the user's own making stands for a rare one: its row starts there.
        s = replace(s, identifier="learned")
    token = s.token or f"<{re.sub(r'[^a-z0-9]+', '-', s.class_word.lower()).strip('-') or 'subject'}>"
    if len(plain_ids(tokenizer, token)) == 1 or not token.strip() or " " in token:
        what = "is already a word of the tokenizer" if token.strip() and " " not in token else "is not a single word"
        raise ValueError(
            f"token {token!r} {what}; choose another, such as '<{token.strip() or 'dog'}>', or identifier='plain'"
        )
    return replace(s, token=token)


def first_rows(model: Model, word: str, count: int = 0) -> list[Tensor]:
    """The rows that a learned word starts from: those of all pieces of `word`, `count` of them (0: all)."""
    rows = []
    for encoder, tokenizer in zip(model.text_encoders, model.tokenizers, strict=True):
        ids = plain_ids(tokenizer, word)
        ids = (ids * (count or 1))[: count or len(ids)]
        rows.append(encoder.get_input_embeddings().weight.detach()[ids].float().clone())
    return rows


class Vocabulary:
    """What learned words can start from: a model's tokenizers and embedding tables."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def rare(self, seed: int) -> str:
        """A rare word of the (first) tokenizer."""
        return rare_token(self.model.tokenizers[0], seed)

    def rows(self, text: str, count: int = 0) -> list[Tensor]:
        """Copies of the token embeddings of `text`, one tensor for each text encoder; `count` of them (0: all)."""
        return first_rows(self.model, text, count)


def subject_prompt(s: Settings, caption: str | None = None) -> str:
    """The template, or a picture's own caption with the subject named in it."""
    words = subject_words(s.token, s.class_word)
    if caption is None:
        return s.template.replace("{subject}", words)
    if "{subject}" in caption:
        return caption.replace("{subject}", words)
    if s.token and s.token.lower() in caption.lower():
        return caption
    named = re.sub(rf"\b{re.escape(s.class_word)}\b", lambda _: words, caption, count=1, flags=re.IGNORECASE)
    return named if s.class_word and named != caption else f"{words}, {caption}"


def class_prompt(s: Settings) -> str:
    """What class images show: the class template with the class word in it."""
    return s.class_template.replace("{class}", s.class_word)
