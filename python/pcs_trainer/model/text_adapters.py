"""What is attached to a text encoder: low-rank residuals on its layers, and the learned token embeddings of a call.

The encoder's own weights and token table never change, so training a word makes no dense gradient and no optimizer
state for the table.  Letters: B prompts, T tokens, C text width, R rank, n token embeddings of a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import pcs_kernels

if TYPE_CHECKING:
    from .peers import TextEncoder


@dataclass(eq=False)
class TextLowRank:
    """scale * (x down^T) up^T on one linear layer of a text encoder, or on the states that one UNet block reads.

    `reach` restricts it to the tokens from a word on (TextBoost's causal form); "" reaches every token.
    """

    down: Tensor  # [R, C_in]
    up: Tensor  # [C_out, R]
    scale: float = 1.0
    key: str = ""
    reach: str = ""

    def __call__(self, x: Tensor, reached: Mapping[str, Tensor]) -> Tensor:
        y = (x @ self.down.to(x.dtype).T) @ self.up.to(x.dtype).T * self.scale  # [B, T, C_out]
        return y if not self.reach else y * reached[self.reach][..., None].to(y.dtype)


@dataclass
class Adapters:
    """What is attached to one encoder, and what the running call tells it."""

    on: bool = True
    residuals: list[tuple[TextLowRank, RemovableHandle]] = field(default_factory=list)
    context: list[tuple[str, TextLowRank]] = field(default_factory=list)  # by block of the UNet
    reached: dict[str, Tensor] = field(default_factory=dict)  # word -> [B, T], 1 from its first place on
    rows: tuple[Tensor, Tensor] | None = None  # learned token embeddings [n, C] and slots [B, T] of this call


# Kept beside the encoders and not as their attributes: transformers' modules would save, copy and move them as theirs.
_ADAPTERS: WeakKeyDictionary[nn.Module, Adapters] = WeakKeyDictionary()
# encoder -> (the version of its token table, the mean norm of the table's rows)
_MEAN_NORMS: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], float]] = WeakKeyDictionary()


def token_table(encoder: nn.Module) -> nn.Embedding:
    """The encoder's own table of token embeddings."""
    return cast("TextEncoder", encoder).get_input_embeddings()


def mean_row_norm(encoder: nn.Module) -> float:
    """The mean norm of the token embeddings in the encoder's own table, computed once per version of the table."""
    weight = token_table(encoder).weight
    version, found = pcs_kernels.weight_version(weight), _MEAN_NORMS.get(encoder)
    if found is None or found[0] != version:
        found = _MEAN_NORMS[encoder] = (version, float(weight.detach().norm(dim=1).mean()))
    return found[1]


def adapters(encoder: nn.Module) -> Adapters:
    """The record of an encoder, made when first asked for, with the hook that puts learned embeddings in place."""
    found = _ADAPTERS.get(encoder)
    if found is None:
        found = _ADAPTERS[encoder] = Adapters()
        state = found  # the hook holds the record alone: a reference to the encoder would keep it alive forever
        token_table(encoder).register_forward_hook(lambda _m, _x, out: _with_rows(state, out))
    return found


def _with_rows(state: Adapters, embedded: Tensor) -> Tensor:
    if state.rows is None:
        return embedded
    table, slots = state.rows
    rows = table[slots.clamp_min(0)].to(embedded.dtype)  # [B, T, C]
    return torch.where((slots >= 0)[..., None], rows, embedded)  # [B, T, C]


def text_module(encoder: nn.Module, name: str) -> nn.Module:
    """A layer by the name that checkpoint files give it; newer transformers have no `text_model` in it."""
    for candidate in (name, name.removeprefix("text_model."), f"text_model.{name}"):
        try:
            return encoder.get_submodule(candidate)
        except AttributeError:
            continue
    raise ValueError(f"the text encoder has no layer {name!r}")


def layers_read(encoders: Sequence[nn.Module], encoder: nn.Module) -> int:
    """How many of an encoder's layers, from the first on, the UNet's inputs depend on.

    SDXL's UNet reads the states before the last layer; the last one is behind the second encoder's pooled text alone.
    """
    unread = len(encoders) > 1 and not hasattr(encoder, "text_projection")
    return cast("TextEncoder", encoder).config.num_hidden_layers - unread


def is_read(encoders: Sequence[nn.Module], encoder: nn.Module, name: str) -> bool:
    """Whether the UNet's inputs depend on this parameter of an encoder."""
    layers = cast("TextEncoder", encoder).config.num_hidden_layers
    if layers_read(encoders, encoder) == layers:
        return True
    return f"layers.{layers - 1}." not in name and "final_layer_norm." not in name


def file_name(name: str) -> str:
    """The name that checkpoint files give to a module or parameter of the encoder."""
    known = name.startswith(("text_model.", "text_projection"))
    return name if known else f"text_model.{name}"


def attach_text(encoder: nn.Module, name: str, residual: TextLowRank) -> TextLowRank:
    """Put a low-rank residual on the linear layer `name` of a text encoder."""
    layer, state = text_module(encoder, name), adapters(encoder)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} is not a linear layer of the text encoder")
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
    """The encoder without its residuals, for as long as the context is open."""
    state = adapters(encoder)
    was, state.on = state.on, False
    try:
        yield
    finally:
        state.on = was
