"""Prompts to the states that the UNet reads: learned words, residuals on the encoder, SDXL's two encoders.

Letters: B prompts, T tokens, C text width, n token embeddings of a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .text_adapters import adapters, without_adapters
from .tokens import Ids, tokenize
from .turns import turn

if TYPE_CHECKING:
    from .model import Model
    from .peers import TextEncoder

Words = Mapping[str, Sequence[Tensor]]  # a learned word -> its token embeddings [n, width], one tensor per text encoder


@dataclass
class Text:
    """Text inputs of the UNet: states [B, T, C] (or one tensor per block), SDXL's pooled text [B, C]."""

    states: Tensor | dict[str, Tensor]
    pooled: Tensor | None
    ids: list[Ids]

    def places(self, i: int, text: str) -> list[int]:
        """Positions of `text` in prompt i."""
        return self.ids[0].places(i, text)

    def to(self, like: Tensor) -> Text:
        """The same in the dtype and on the device of the UNet's weights."""
        states = self.states
        moved = {k: v.to(like) for k, v in states.items()} if isinstance(states, dict) else states.to(like)
        return Text(moved, None if self.pooled is None else self.pooled.to(like), self.ids)

    def added(self, height: int, width: int) -> dict[str, Tensor] | None:
        """SDXL's further inputs for uncropped images of height x width pixels; None for other models."""
        if self.pooled is None:
            return None
        # SDXL reads (original height, width, crop top, left, target height, width); filled where they are read, as a
        # copy from the host would wait for the device.
        sizes = torch.zeros((1, 6), device=self.pooled.device, dtype=torch.float32)
        sizes[:, 0::4], sizes[:, 1::4] = height, width
        return {"text_embeds": self.pooled, "time_ids": sizes.expand(len(self.pooled), -1)}


@dataclass
class Said:
    """What one text encoder reads of some prompts."""

    ids: Tensor  # [B, T] token ids
    slots: Tensor  # [B, T] rows of the table of learned embeddings, or -1
    reached: dict[str, Tensor]  # word of a causal residual -> [B, T]: 1 from its first place to the end token, else 0
    empty: Tensor  # [B] which prompts have no word


@dataclass
class Reading:
    """Prompts as the text encoders read them: all that depends on the texts, so that the rest is the device's work."""

    said: list[Said]  # one for each encoder
    blank: list[Said]  # the same of the empty prompt
    ids: list[Ids]


def read(model: Model, prompts: Sequence[str], words: Words | None = None) -> Reading:
    """Prompts to what the model's text encoders read, on the CPU; the words as `encode` takes them."""
    said: list[Said] = []
    blank: list[Said] = []
    ids: list[Ids] = []
    for e, (encoder, tokenizer) in enumerate(zip(model.text_encoders, model.tokenizers, strict=True)):
        sizes = {word: len(rows[e]) for word, rows in (words or {}).items()}
        state = adapters(encoder)
        known = {r.reach for r, _ in state.residuals} | {r.reach for _, r in state.context}
        for texts, found in ((prompts, said), ([""], blank)):
            tokens = tokenize(tokenizer, texts, sizes)
            reached = {word: _from_word_on(tokens, word) for word in sorted(known) if word}
            found.append(Said(tokens.ids, tokens.slots, reached, torch.tensor([not text.strip() for text in texts])))
            if texts is prompts:
                ids.append(tokens)
    return Reading(said, blank, ids)


def encode(
    model: Model, prompts: Sequence[str] | Reading, words: Words | None = None, hold_first: bool = False
) -> Text:
    """The text inputs of the UNet for prompts.

    Args:
        model: its text encoders, with what is attached to them.
        prompts: the texts, B of them, or what `read` made of them for these words.
        words: learned words that the prompts may use.
        hold_first: keep the first token's state, and the empty prompt's, as the frozen encoder makes them: TextBoost's
            code (arXiv 2409.08248) trains so, and what was trained so is sampled so.

    Returns:
        The states in the dtype of the encoders; `Text.to` brings them to the UNet's.
    """
    words = dict(words or {})
    reading = prompts if isinstance(prompts, Reading) else read(model, prompts, words)
    parts, pooled = [], None
    several = len(model.text_encoders) > 1  # SDXL reads the last but one layer of its encoders
    with turn(model, "text_encoders"):
        for e, (encoder, said, blank) in enumerate(zip(model.text_encoders, reading.said, reading.blank, strict=True)):
            table = [rows[e] for rows in words.values()]
            states, pooled = _states(encoder, said, torch.cat(table) if table else None, several)
            if hold_first:
                states, pooled = _held(encoder, said, blank, (states, pooled), several)
            parts.append(states)
    joined = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]  # [B, T, C]
    return Text(by_block(model, joined), pooled, reading.ids)


def _states(encoder: TextEncoder, said: Said, table: Tensor | None, penultimate: bool) -> tuple[Tensor, Tensor | None]:
    """States [B, T, C] and, of an encoder with a projection, the pooled text [B, C]."""
    state = adapters(encoder)
    where = encoder.get_input_embeddings().weight.device
    state.reached = {word: reached.to(where) for word, reached in said.reached.items()}
    state.rows = None if table is None else (table.to(where), said.slots.to(where))
    try:
        out = encoder(said.ids.to(where), output_hidden_states=penultimate)
    finally:
        state.rows = None
    return (out.hidden_states[-2] if penultimate else out.last_hidden_state), getattr(out, "text_embeds", None)


def _from_word_on(said: Ids, word: str) -> Tensor:
    """1 from the first place of a learned word up to the end token, else 0: [B, T]."""
    reached = torch.zeros(said.ids.shape)
    for i in range(len(reached)):
        places = said.places(i, word)
        if places:
            reached[i, places[0] : said.length(i)] = 1
    return reached


def _held(
    encoder: TextEncoder, said: Said, blank: Said, out: tuple[Tensor, Tensor | None], penultimate: bool
) -> tuple[Tensor, Tensor | None]:
    """States and pooled text, with the frozen encoder's at the first token and for empty prompts."""
    states, pooled = out  # [B, T, C], [B, C]
    state = adapters(encoder)
    reached = state.reached  # of the prompts: what follows on their states still needs it
    with torch.no_grad(), without_adapters(encoder):
        empty, empty_pooled = _states(encoder, blank, None, penultimate)  # [1, T, C], [1, C]
    state.reached = reached
    is_empty = said.empty.to(states.device)  # [B]
    if pooled is not None and empty_pooled is not None:
        pooled = torch.where(is_empty[:, None], empty_pooled, pooled)  # [B, C]
    first = torch.arange(states.shape[1], device=states.device)[None, :, None] == 0  # [1, T, 1]
    return torch.where(is_empty[:, None, None] | first, empty, states), pooled


def by_block(model: Model, states: Tensor) -> Tensor | dict[str, Tensor]:
    """The states, or with residuals on what single blocks read, one tensor per block."""
    state = adapters(model.text_encoder)
    if not state.context or not state.on:
        return states
    result = {name: states for name in model.unet.attention_names()}
    for block, residual in state.context:
        result[block] = result[block] + residual(states, state.reached)  # [B, T, C]
    return result
