"""Putting concepts on a model and taking them off, and what they change there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..model.fingerprint import fingerprint, same_base
from ..model.text import encode
from ..model.text_adapters import TextLowRank, attach_context, attach_text, detach_text, token_table
from ..unet.int8 import hold, layer_in_8_bits, quantized
from ..unet.layers import LowRank, laid_out_as, replace_data
from ..unet.streaming import at_hand
from .base_weights import is_projection, network, parameters_of
from .concept import Concept
from .grammar import OWN_WORD, UNET, Kind, Part, Slot, spell

if TYPE_CHECKING:
    from ..model.model import Model

PREDICTION_SIDE = 16  # latents: enough for a UNet that halves them three times, and cheap on a CPU


def check_base(concept: Concept, model: Model, name: str) -> None:
    """Raise ValueError where the concept, called `name` in the message, was made on another base model."""
    if concept.base and not same_base(concept.base, fingerprint(model)):
        made_on = concept.meta.get("base_name", "another model")
        raise ValueError(f"{name} was made on {made_on}, not on {model.name}; load that model, or pass force=True")


def check_fits(concept: Concept, model: Model, name: str) -> None:
    """Raise ValueError where a tensor of the concept, called `name` in the message, has no place on the model."""
    by_part: dict[Part, dict[str, nn.Parameter]] = {}

    def parameter(part: Part, called: str) -> nn.Parameter | None:
        if part not in by_part:
            by_part[part] = _parameters(model, part, name)
        return by_part[part].get(called)

    for slot, (down, up) in concept.residuals().items():
        if slot.kind is Kind.CONTEXT:
            _check_context(model, slot, down, up, name)
            continue
        weight = parameter(slot.part, f"{slot.layer}.weight")
        shape = None if weight is None or not is_projection(slot.path, weight) else tuple(weight.shape[:2])
        if shape != (up.shape[0], down.shape[1]):
            raise ValueError(f"{name}: this model has no projection {slot.path!r} of {down.shape[1]} to {up.shape[0]}")
    for slot, tensor in concept.changes().items():
        weight = parameter(slot.part, slot.layer)
        if weight is None or weight.shape != tensor.shape:
            raise ValueError(f"{name}: this model has no parameter {spell(slot)!r} of shape {tuple(tensor.shape)}")
    widths = text_widths(model)
    for word, rows in concept.words.items():
        if [r.shape[1] for r in rows] != widths:
            raise ValueError(f"{name}: the token embeddings of {word!r} do not have this model's text width {widths}")


def _check_context(model: Model, slot: Slot, down: Tensor, up: Tensor, name: str) -> None:
    width = int(model.unet.settings["cross_attention_dim"])
    if slot.layer not in model.unet.attention_names() or (up.shape[0], down.shape[1]) != (width, width):
        raise ValueError(
            f"{name}: this model has no block {slot.layer!r} that reads text states of {down.shape[1]} to {up.shape[0]}"
        )


def text_widths(model: Model) -> list[int]:
    """The width of each text encoder's token embeddings."""
    return [token_table(encoder).weight.shape[1] for encoder in model.text_encoders]


def _parameters(model: Model, part: Part, name: str) -> dict[str, nn.Parameter]:
    try:
        return parameters_of(model, part)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


@contextmanager
def attached(
    model: Model, concepts: Sequence[Concept], strengths: Sequence[float] | None = None
) -> Iterator[dict[str, list[Tensor]]]:
    """Put concepts on a model, yield their learned words, and take them off again.

    Args:
        model: its weights are the same bits afterwards.
        concepts: each with a `key` and learned words of its own.
        strengths: one for each concept, default: 1. It scales residuals; whole values become
            base + sum of strength * (value - base); words have none.
    """
    strengths = [1.0] * len(concepts) if strengths is None else list(strengths)
    if len(strengths) != len(concepts):
        raise ValueError(f"{len(concepts)} concepts and {len(strengths)} strengths: give one strength for each concept")
    undo: list[Callable[[], None]] = []
    keys: list[str] = []
    words: dict[str, list[Tensor]] = {}
    try:
        for concept, strength in zip(concepts, strengths, strict=True):
            if concept.key in keys:
                raise ValueError(f"two concepts are called {concept.key!r}: give one another name with .renamed(...)")
            keys.append(concept.key)
            words.update(_own_words(concept, words))
            _put_residuals(model, concept, strength)
        _put_values(model, concepts, strengths, undo)
        yield words
    finally:
        for key in keys:
            model.unet.detach(key)
            for encoder in model.text_encoders:
                detach_text(encoder, key)
        for step in reversed(undo):
            step()


def _own_words(concept: Concept, taken: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    for word in concept.words:
        if word in taken:
            raise ValueError(f"two concepts both use the word {word!r}: give one another name with .renamed(...)")
    return concept.words


def _put_residuals(model: Model, concept: Concept, strength: float) -> None:
    device, own = model.unet.conv_in.weight.device, model.unet.conv_in.weight.dtype
    for slot, pair in concept.residuals().items():
        halved = own == torch.bfloat16 and all(t.dtype == torch.bfloat16 for t in pair)  # no kernel widens a pair
        both = torch.bfloat16 if halved else torch.float32
        down, up = (t.to(device, both) for t in pair)
        if slot.kind is Kind.PAIR and slot.part == UNET:
            model.unet.attach(slot.layer, LowRank(down, up, strength, key=concept.key))
            continue
        reach = concept.token if slot.kind in OWN_WORD else ""
        residual = TextLowRank(down, up, strength, concept.key, reach)
        if slot.kind is Kind.CONTEXT:
            attach_context(model.text_encoder, slot.layer, residual)
        else:
            attach_text(network(model, slot.part), slot.layer, residual)


def _put_values(
    model: Model, concepts: Sequence[Concept], strengths: Sequence[float], undo: list[Callable[[], None]]
) -> None:
    """Replace parameters by their changed values, on the device and in 16 bits; `undo` gets the way back."""
    changes: dict[nn.Parameter, list[tuple[float, Tensor, Kind]]] = defaultdict(list)
    by_part: dict[Part, dict[str, nn.Parameter]] = {}
    for concept, strength in zip(concepts, strengths, strict=True):
        for slot, tensor in concept.changes().items() if strength else ():  # at 0 the base's value stays
            if slot.part not in by_part:
                by_part[slot.part] = _parameters(model, slot.part, concept.key)
            if slot.part == UNET:
                undo += at_hand(model.unet, slot.layer)
            changes[by_part[slot.part][slot.layer]].append((strength, tensor, slot.kind))
    with torch.no_grad():
        for parameter, parts in changes.items():
            undo.append(partial(replace_data, parameter, parameter.data))
            strength, tensor, kind = parts[0]
            if len(parts) == 1 and strength == 1.0 and kind is Kind.VALUE:
                new = tensor  # as it is: base + (value - base) would be rounded
            else:
                base = parameter.data.float()
                new = base.clone()
                for strength, tensor, kind in parts:
                    tensor = tensor.to(base)
                    new += strength * (tensor if kind is Kind.DIFFERENCE else tensor - base)
            replace_data(parameter, laid_out_as(parameter, new))


@contextmanager
def in_place(model: Model, concept: Concept) -> Iterator[Concept]:
    """Put a concept that is a whole UNet in the place of the model's own, and yield what is left to attach.

    The model's UNet is read again afterwards, so that two are never in memory. Other concepts are left as they are.
    """
    own = dict(parameters_of(model, UNET))
    values = {slot: t for slot, t in concept.changes().items() if slot.part == UNET and slot.kind is Kind.VALUE}
    if len(values) < len(own):
        yield concept
        return
    try:
        for slot, value in values.items():
            parameter, layer = own[slot.layer], layer_in_8_bits(model.unet, slot.layer)
            if layer is None:
                replace_data(parameter, laid_out_as(parameter, value))
            else:
                hold(layer, quantized(value.to(parameter.device)))
                layer.original = None  # the file has another
        del own, parameter, layer
        moved = {spell(slot) for slot in values}
        yield replace(concept, tensors={name: t for name, t in concept.tensors.items() if name not in moved})
    finally:
        model.release("unet")


@torch.no_grad()
def predict(
    model: Model,
    concepts: Sequence[Concept],
    prompt: str,
    strength: float = 1.0,
    words: dict[str, list[Tensor]] | None = None,
    hold_first: bool = False,
) -> Tensor:
    """One prediction of the UNet for fixed noise: it tells whether concepts do anything, and whether two do the same.

    Args:
        strength: of each concept.
        words: learned words beside the concepts' own.
        hold_first: keep the text's first token, and the empty prompt, as the frozen encoder makes them; a concept
            that asks for it has it anyway.
    """
    settings = model.unet.settings
    side = min(PREDICTION_SIDE, int(model.unet.config.get("sample_size") or PREDICTION_SIDE))
    generator = torch.Generator().manual_seed(0)
    weight = model.unet.conv_in.weight
    x = torch.randn(1, settings["in_channels"], side, side, generator=generator).to(weight)
    with attached(model, concepts, [strength] * len(concepts)) as theirs:
        hold_first = hold_first or any(c.hold_first for c in concepts)
        text = encode(model, [prompt], (words or {}) | theirs, hold_first).to(weight)
        context = model.unet.text_kv(text.states)
        added = text.added(8 * side, 8 * side) or {}  # the autoencoder's latents are an eighth of the pixels' size
        if model.unet.class_embedding is not None:
            added["class_labels"] = torch.zeros(1, dtype=torch.long, device=weight.device)
        return model.unet(x, torch.tensor([len(model.schedule) // 2]), context, added)


def differs(model: Model, concept: Concept, name: str) -> bool:
    """Whether the concept changes a prediction; the other side is computed by the same operations, at strength 0.

    Raises ValueError where a prediction with the concept, called `name` in the message, is not finite.
    """
    without = replace(concept, words={})
    prompt = concept.instance_prompt
    with_it = predict(model, [concept], prompt)
    if not bool(with_it.isfinite().all()):
        raise ValueError(f"{name}: a prediction with it is NaN or infinite; its values are beyond what the model takes")
    return not torch.equal(with_it, predict(model, [without], prompt, strength=0.0))
