"""Text to the states that the UNet reads: learned words, low-rank residuals on the encoder, SDXL's two encoders.

A learned word ("<dog>") has rows of its own: neither the tokenizer nor the encoder's table changes, so training it
makes no dense gradient and no optimizer state for the table.  Letters: B prompts, T tokens, C text width, n rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Words = Mapping[str, Sequence[Tensor]]  # a learned word -> its rows [n, width], one tensor for each text encoder


@dataclass
class Ids:
    """Token ids [B, T] and slots [B, T]: the row of the stacked table that stands at a place, or -1."""

    ids: Tensor
    slots: Tensor
    tokenizer: Any
    spans: dict[str, range]  # a learned word -> its rows in the stacked table

    def places(self, i: int, text: str) -> list[int]:
        """Where prompt i says `text`: a learned word, or ordinary words with all their pieces."""
        span = self.spans.get(text.lower())
        if span is not None:
            return [j for j, slot in enumerate(self.slots[i].tolist()) if slot in span]
        pieces = plain_ids(self.tokenizer, text)
        row = [-1 if slot >= 0 else t for t, slot in zip(self.ids[i].tolist(), self.slots[i].tolist(), strict=True)]
        starts = [j for j in range(1, len(row) - len(pieces) + 1) if row[j : j + len(pieces)] == pieces]
        return [j + k for j in starts for k in range(len(pieces))] if pieces else []

    def length(self, i: int) -> int:
        """The number of tokens up to the end token, that one included; what follows is padding."""
        ended = (self.ids[i] == self.tokenizer.eos_token_id).nonzero()
        return int(ended[0]) + 1 if len(ended) else self.ids.shape[1]


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def _splitter(words: Sequence[str]) -> re.Pattern[str] | None:
    """Matches learned words; one that begins or ends with a letter only where no other letter touches it."""

    def guarded(word: str) -> str:
        left, right = r"(?<!\w)" * word[0].isalnum(), r"(?!\w)" * word[-1].isalnum()
        return left + re.escape(word) + right

    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("(" + "|".join(map(guarded, longest_first)) + ")", re.IGNORECASE) if words else None


def tokenize(tokenizer: Any, prompts: Sequence[str], words: Mapping[str, int] | None = None) -> Ids:
    """Token ids of prompts in which `words` (learned word -> number of rows) stand for rows of a table."""
    spans, start = {}, 0
    for word, count in (words or {}).items():
        spans[word.lower()] = range(start, start + count)
        start += count
    split = _splitter(list(spans))
    room = tokenizer.model_max_length
    first, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = torch.full((len(prompts), room), end if pad is None else pad, dtype=torch.long)
    slots = torch.full_like(ids, -1)
    for i, prompt in enumerate(prompts):
        row: list[tuple[int, int]] = []
        for part in split.split(prompt) if split else [prompt]:
            span = spans.get(part.lower())
            row += [(0, slot) for slot in span] if span is not None else [(t, -1) for t in plain_ids(tokenizer, part)]
        row = [(first, -1), *row[: room - 2], (end, -1)]
        ids[i, : len(row)], slots[i, : len(row)] = torch.tensor(row).T
    return Ids(ids, slots, tokenizer, spans)


@dataclass(eq=False)
class TextLowRank:
    """scale * (x down^T) up^T on one linear layer of a text encoder, or on the states that one block of the UNet reads.

    `reach` holds it to the tokens from a word on (TextBoost's causal form); "" reaches every token.
    """

    down: Tensor  # [R, C_in]
    up: Tensor  # [C_out, R]
    scale: float = 1.0
    key: str = ""
    reach: str = ""

    def __call__(self, x: Tensor, reached: Mapping[str, Tensor]) -> Tensor:
        y = (x @ self.down.to(x.dtype).T) @ self.up.to(x.dtype).T * self.scale
        return y if not self.reach else y * reached[self.reach][..., None].to(y.dtype)


@dataclass
class _Adapters:
    """What is attached to one encoder, and what the running call tells it."""

    on: bool = True
    residuals: list[tuple[TextLowRank, Any]] = field(default_factory=list)  # with the handle that takes it off
    context: list[tuple[str, TextLowRank]] = field(default_factory=list)  # by block of the UNet
    reached: dict[str, Tensor] = field(default_factory=dict)  # word -> [B, T]
    rows: tuple[Tensor, Tensor] | None = None  # the table of learned rows and the slots [B, T] of this call


def adapters(encoder: nn.Module) -> _Adapters:
    """The encoder's own record; made, with the hook that puts learned rows in place, when first asked for."""
    found = encoder.__dict__.get("_pcs_adapters")
    if found is None:
        found = _Adapters()
        encoder.__dict__["_pcs_adapters"] = found
        encoder.get_input_embeddings().register_forward_hook(lambda _m, _x, out: _with_rows(found, out))
    return found


def _with_rows(state: _Adapters, embedded: Tensor) -> Tensor:
    if state.rows is None:
        return embedded
    table, slots = state.rows
    rows = table[slots.clamp_min(0)].to(embedded.dtype)
    return torch.where((slots >= 0)[..., None], rows, embedded)


def text_module(encoder: nn.Module, name: str) -> nn.Module:
    """A layer by the name that checkpoint files give it; newer transformers have no `text_model` in it."""
    for candidate in (name, name.removeprefix("text_model."), f"text_model.{name}"):
        try:
            return encoder.get_submodule(candidate)
        except AttributeError:
            continue
    raise ValueError(f"the text encoder has no layer {name!r}")


def file_name(name: str) -> str:
    """The name that checkpoint files give to a module or parameter of the encoder."""
    known = name.startswith(("text_model.", "text_projection"))
    return name if known else f"text_model.{name}"


def attach_text(encoder: nn.Module, name: str, residual: TextLowRank) -> TextLowRank:
    """Put a low-rank residual on the linear layer `name` of a text encoder."""
    layer, state = text_module(encoder, name), adapters(encoder)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} is no linear layer of the text encoder")
    if residual.down.shape[-1] != layer.in_features or residual.up.shape[0] != layer.out_features:
        shapes = f"down {tuple(residual.down.shape)}, up {tuple(residual.up.shape)}"
        raise ValueError(f"{name} maps {layer.in_features} to {layer.out_features}; the residual's {shapes} do not fit")
    handle = layer.register_forward_hook(
        lambda _m, inputs, out: out + residual(inputs[0], state.reached) if state.on else out
    )
    state.residuals.append((residual, handle))
    return residual


def attach_context(encoder: nn.Module, block: str, residual: TextLowRank) -> TextLowRank:
    """Put a low-rank residual on the text states that one transformer block of the UNet reads."""
    adapters(encoder).context.append((block, residual))
    return residual


def detach_text(encoder: nn.Module, key: str | None = None) -> None:
    """Take the residuals of the concept `key` off a text encoder, or all of them."""
    state = adapters(encoder)
    for residual, handle in state.residuals:
        if key is None or residual.key == key:
            handle.remove()
    state.residuals = [(r, h) for r, h in state.residuals if key is not None and r.key != key]
    state.context = [(b, r) for b, r in state.context if key is not None and r.key != key]


@contextmanager
def without_adapters(encoder: nn.Module) -> Iterator[None]:
    """The encoder as it was before anything was attached to it."""
    state = adapters(encoder)
    was, state.on = state.on, False
    try:
        yield
    finally:
        state.on = was


@dataclass
class Text:
    """What the UNet needs of prompts: states [B, T, C] (or one for each block), SDXL's pooled text [B, C]."""

    states: Tensor | dict[str, Tensor]
    pooled: Tensor | None
    ids: list[Ids]

    def places(self, i: int, text: str) -> list[int]:
        return self.ids[0].places(i, text)

    def to(self, like: Tensor) -> Text:
        """The same in the dtype and on the device of the UNet's weights."""
        states = self.states
        moved = {k: v.to(like) for k, v in states.items()} if isinstance(states, dict) else states.to(like)
        return Text(moved, None if self.pooled is None else self.pooled.to(like), self.ids)

    def added(self, height: int, width: int) -> dict[str, Tensor] | None:
        """SDXL's further inputs for whole, uncropped pictures of height x width pixels."""
        if self.pooled is None:
            return None
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=self.pooled.device)
        return {"text_embeds": self.pooled, "time_ids": sizes.expand(len(self.pooled), -1)}


def encode(model: Any, prompts: Sequence[str], words: Words | None = None, hold_first: bool = False) -> Text:
    """The text states of prompts. hold_first: the first token, and the empty prompt, stay as the frozen encoder's."""
    words = dict(words or {})
    parts, pooled, ids = [], None, []
    for e, (encoder, tokenizer) in enumerate(zip(model.text_encoders, model.tokenizers, strict=True)):
        said = tokenize(tokenizer, prompts, {w: len(rows[e]) for w, rows in words.items()})
        table = [rows[e] for rows in words.values()]
        states, pooled = _states(encoder, said, torch.cat(table) if table else None, len(model.text_encoders) > 1)
        if hold_first:
            states = _held(encoder, tokenizer, prompts, states, len(model.text_encoders) > 1)
        parts.append(states)
        ids.append(said)
    joined = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    return Text(_by_block(model, joined, ids), pooled, ids)


def _states(encoder: nn.Module, said: Ids, table: Tensor | None, penultimate: bool) -> tuple[Tensor, Tensor | None]:
    """[B, T, C] and, of an encoder with a projection, the pooled text."""
    state = adapters(encoder)
    where = encoder.get_input_embeddings().weight.device
    known = {r.reach for r, _ in state.residuals} | {r.reach for _, r in state.context}
    state.reached = {word: _from_word_on(said, word).to(where) for word in known if word}
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


def _held(encoder: nn.Module, tokenizer: Any, prompts: Sequence[str], states: Tensor, penultimate: bool) -> Tensor:
    state = adapters(encoder)
    reached = state.reached  # of the prompts: what follows on their states still needs it
    with torch.no_grad(), without_adapters(encoder):
        empty, _ = _states(encoder, tokenize(tokenizer, [""]), None, penultimate)
    state.reached = reached
    is_empty = torch.tensor([not p.strip() for p in prompts], device=states.device)[:, None, None]
    first = torch.arange(states.shape[1], device=states.device)[None, :, None] == 0
    return torch.where(is_empty | first, empty, states)


def _by_block(model: Any, states: Tensor, ids: list[Ids]) -> Tensor | dict[str, Tensor]:
    """The states, or with residuals on what single blocks read, one for each block."""
    state = adapters(model.text_encoder)
    if not state.context or not state.on:
        return states
    result = {name: states for name in model.unet.attention_names()}
    for block, residual in state.context:
        result[block] = result[block] + residual(states, state.reached)
    return result
