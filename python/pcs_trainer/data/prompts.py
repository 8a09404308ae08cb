"""Words for subjects: rare tokens of a tokenizer, a learned word's first rows, prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..concept.concept import subject_words
from ..model.tokens import cut_off, has_word, plain_ids
from .rare_words import KNOWN

if TYPE_CHECKING:
    from ..model.model import Model
    from ..settings import Settings


PIECES = 3  # tokens of a rare word at most (DreamBooth, 3.2)
RAREST = 100  # of the rare words, one of which a seed chooses


def rare_tokens(tokenizer: Any, known: bool = False) -> list[str]:
    """Words that are one late, short, meaningless entry of the vocabulary, the rarest first.

    Merges are learned from frequent to rare, so a late entry is a rare one (DreamBooth draws T5's ids 5000-10000).

    Args:
        tokenizer: whose vocabulary.
        known: leave in what has a meaning to many people (rare_words.py), as version 0.1.0 did.
    """
    vocabulary = tokenizer.get_vocab()
    short = [(i, t[:-4]) for t, i in vocabulary.items() if t.endswith("</w>") and re.fullmatch(r"[a-z]{3}</w>", t)]
    consonants = [(i, t) for i, t in short if not re.search("[aeiouy]", t)]
    found = [t for _, t in sorted(consonants or short, reverse=True) if known or t not in KNOWN]
    return [t for t in found if len(plain_ids(tokenizer, t)) == 1]


def rare_token(tokenizer: Any, seed: int = 0, known: bool = False) -> str:
    """One of the hundred rarest short words of a tokenizer."""
    found = rare_tokens(tokenizer, known)[:RAREST]
    if not found:
        raise ValueError("this tokenizer has no rare short word; name one with token=..., or use identifier='learned'")
    return found[seed % len(found)]


def choose_token(model: Model, s: Settings) -> Settings:
    """Settle what names the subject and what a learned word starts from; a learned word must not be a word already."""
    tokenizer = model.tokenizers[0]
    if s.identifier == "plain":
        return s
    if s.identifier == "rare":
        if not s.token:
            return replace(s, token=rare_token(tokenizer, s.seed))
        if not _is_bracketed(s.token):
            return _checked_rare(tokenizer, s)
        s = replace(s, identifier="learned")  # a word in brackets is nobody's: as ordinary text it is its punctuation
    token = s.token or f"<{re.sub(r'[^a-z0-9]+', '-', s.class_word.lower()).strip('-') or 'subject'}>"
    if len(plain_ids(tokenizer, token)) == 1 or not token.strip() or " " in token:
        what = "is already a word of the tokenizer" if token.strip() and " " not in token else "is not a single word"
        raise ValueError(
            f"token {token!r} {what}; choose another, such as '<{token.strip() or 'dog'}>', or identifier='plain'"
        )
    return replace(s, token=token, init_word=s.init_word or rare_token(tokenizer, s.seed))


def _is_bracketed(token: str) -> bool:
    """Whether a token is spelled like a learned word: <dog>, [V]."""
    return len(token) > 2 and (token[0], token[-1]) in {("<", ">"), ("[", "]"), ("{", "}")}


def _checked_rare(tokenizer: Any, s: Settings) -> Settings:
    """The settings, whose token is one to three of the tokenizer's own tokens."""
    pieces = len(plain_ids(tokenizer, s.token))
    if not 0 < pieces <= PIECES or not s.token.strip():
        raise ValueError(
            f"token {s.token!r} is {pieces} tokens of the tokenizer, and a rare word has at most {PIECES}; choose "
            f"another, such as {rare_token(tokenizer, s.seed)!r}, or identifier='learned'"
        )
    return s


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
        """The rare word that a learned one starts from where its settings name none: a run of version 0.1.0."""
        return rare_token(self.model.tokenizers[0], seed, known=True)

    def rows(self, text: str, count: int = 0) -> list[Tensor]:
        """Copies of the token embeddings of `text`, one tensor for each text encoder; `count` of them (0: all)."""
        return first_rows(self.model, text, count)

    def starting_rows(self, s: Settings) -> list[Tensor]:
        """The token embeddings that the subject's learned word starts from; their number is as in `word_size`."""
        start = starting_word(s) or self.rare(s.seed)
        rows = self.rows(start)
        fewer = any(len(own) < s.token_vectors for own in rows)
        return self.rows(start, s.token_vectors) if fewer else rows


def starting_word(s: Settings) -> str:
    """What the subject's learned word starts from; "" where its settings name nothing."""
    return (s.init_word or "").replace("{class}", s.class_word)


def word_size(tokenizer: Any, s: Settings) -> int:
    """The number of token embeddings of the subject's learned word: token_vectors, and no fewer than its start has."""
    return max(s.token_vectors, len(plain_ids(tokenizer, starting_word(s))))


def templates(s: Settings) -> tuple[str, ...]:
    """The subject prompts before the subject is put in: one of them is drawn for each picture of a step."""
    return (s.template,) if isinstance(s.template, str) else tuple(s.template)


def own_words(s: Settings) -> str:
    """How the method's prompts name the subject: by token and class, or by the token alone where no template has both.

    Textual Inversion's "a photo of V*" is the second kind.
    """
    both = any("{subject}" in template for template in templates(s))
    return subject_words(s.token, s.class_word) if both else s.token or s.class_word


def subject_prompts(s: Settings, caption: str | None = None) -> tuple[str, ...]:
    """Every prompt that a picture may have: the templates', or its own caption's with the subject named in it."""
    words, token = own_words(s), s.token or s.class_word

    def named(text: str) -> str:
        both = subject_words(s.token, s.class_word)
        return text.replace("{subject}", both).replace("{token}", token)

    if caption is None:
        return tuple(map(named, templates(s)))
    if "{subject}" in caption or "{token}" in caption:
        return (named(caption),)
    if has_word(caption, s.token):
        return (caption,)
    placed = re.sub(rf"\b{re.escape(s.class_word)}\b", lambda _: words, caption, count=1, flags=re.IGNORECASE)
    return (placed if s.class_word and placed != caption else f"{words}, {caption}",)


def subject_prompt(s: Settings, caption: str | None = None) -> str:
    """The first of the subject's prompts."""
    return subject_prompts(s, caption)[0]


def check_length(tokenizer: Any, prompt: str, name: str, sizes: Mapping[str, int], word: str) -> str:
    """A note where a picture's prompt is longer than the text encoder reads, "" where it is not.

    Args:
        tokenizer: the first one.
        prompt: the picture's.
        name: the picture's, for the sentence.
        sizes: learned word -> number of its token embeddings.
        word: what names the subject.

    Raises:
        ValueError: the prompt loses the subject's word, so that the picture would train something else.
    """
    beyond, lost = cut_off(tokenizer, prompt, sizes, word)
    if not beyond:
        return ""
    room = tokenizer.model_max_length - 2
    what = f"the prompt of {name} has {beyond + room} tokens and the text encoder reads {room}"
    if lost:
        raise ValueError(f"{what}, before {word!r} comes; name the subject earlier in its caption, or shorten it")
    return f"{what}: the rest is cut off"


def class_prompt(s: Settings) -> str:
    """What class images show: the class template with the class word in it."""
    return s.class_template.replace("{class}", s.class_word)
