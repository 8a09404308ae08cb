"""Names of a concept's tensors: where each one belongs. The only file that spells their prefixes and endings.

    unet.{module}.down [R, C_in], unet.{module}.up [C_out, R]   PAIR        a low-rank residual on a projection
    text_encoder.{module}.causal_down, .causal_up               CAUSAL      the same, from the concept's own word on
    context.{block}.down, context.{block}.up                    CONTEXT     on the text states that one UNet block reads
    unet.{parameter}                                            VALUE       the whole new value of a parameter
    unet.{parameter}.diff                                       DIFFERENCE  what is added to a parameter
    word.{number}.{word} [rows, width]                          WORD        a learned word's token embeddings

The parts are unet, text_encoder and text_encoder_2; `number` counts the text encoders from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

Part = Literal["unet", "text_encoder", "text_encoder_2"]
UNET: Part = "unet"
TEXT_PARTS: tuple[Part, ...] = ("text_encoder", "text_encoder_2")  # in the order of a model's text encoders
PARTS: tuple[Part, ...] = (UNET, *TEXT_PARTS)


class Kind(Enum):
    """What a tensor of a concept does where it belongs."""

    PAIR = "pair"
    CAUSAL = "causal"
    CONTEXT = "context"
    VALUE = "value"
    DIFFERENCE = "diff"
    WORD = "word"


class Half(Enum):
    """The two matrices of a low-rank residual."""

    DOWN = "down"
    UP = "up"


CONTEXT_PREFIX, WORD_PREFIX, DIFFERENCE_ENDING = "context.", "word.", ".diff"
PAIR_ENDINGS = {Half.DOWN: ".down", Half.UP: ".up"}
CAUSAL_ENDINGS = {Half.DOWN: ".causal_down", Half.UP: ".causal_up"}
ENDINGS = {Kind.PAIR: PAIR_ENDINGS, Kind.CAUSAL: CAUSAL_ENDINGS, Kind.CONTEXT: PAIR_ENDINGS}
LOW_RANK = frozenset(ENDINGS)  # the kinds that have two halves
OWN_WORD = frozenset({Kind.CAUSAL, Kind.CONTEXT})  # they act on the tokens from the concept's own word on


@dataclass(frozen=True)
class Slot:
    """Where a tensor of a concept belongs.

    part: the network; of a CONTEXT the UNet, of a WORD the text encoder whose width its rows have.
    layer: a module (PAIR, CAUSAL), a transformer block (CONTEXT), a parameter (VALUE, DIFFERENCE) or the word (WORD).
    """

    part: Part
    layer: str
    kind: Kind

    @property
    def path(self) -> str:
        """`part.layer`, as a model's parameters and modules are called: "unet.mid_block.attentions.0.proj_out"."""
        return f"{self.part}.{self.layer}"

    @property
    def stem(self) -> str:
        """A low-rank residual's name without its half; that of a CAUSAL ends in ".causal", so that no two are alike."""
        if self.kind is Kind.CONTEXT:
            return f"{CONTEXT_PREFIX}{self.layer}"
        return f"{self.path}.causal" if self.kind is Kind.CAUSAL else self.path


def parse(name: str) -> Slot:
    """The slot that a tensor's name says.

    Raises ValueError, one sentence, where the name follows no form of the grammar.
    """
    return _read(name)[0]


def half_of(name: str) -> Half | None:
    """Which half of a low-rank residual a tensor's name says; None for every other name."""
    slot, half = _forms(name)
    return None if slot is None else half


def spell(slot: Slot, half: Half | None = None) -> str:
    """The tensor's name for a slot; `half` is needed for PAIR, CAUSAL and CONTEXT, and refused for the others.

    Raises ValueError where no name says this slot.
    """
    if (half is not None) != (slot.kind in LOW_RANK):
        wants = "needs a half, down or up" if slot.kind in LOW_RANK else "has no down and no up half"
        raise ValueError(f"a slot of the kind {slot.kind.name} {wants} ({slot.layer!r} in {slot.part})")
    if slot.kind is Kind.WORD:
        name = f"{WORD_PREFIX}{PARTS.index(slot.part) - 1}.{slot.layer}"  # of the UNet -1, which is refused below
    elif half is not None:
        start = CONTEXT_PREFIX if slot.kind is Kind.CONTEXT else f"{slot.part}."
        name = f"{start}{slot.layer}{ENDINGS[slot.kind][half]}"
    else:
        name = slot.path + DIFFERENCE_ENDING * (slot.kind is Kind.DIFFERENCE)
    if _forms(name) != (slot, half):  # such as a parameter called "x.down", or a causal pair on the UNet
        raise ValueError(f"no name says {slot.kind.name} of {slot.layer!r} in {slot.part}: {name!r} is read otherwise")
    return name


def names(slot: Slot) -> tuple[str, ...]:
    """All tensors of a slot by name: (down, up) of a low-rank residual, else one."""
    return tuple(spell(slot, half) for half in Half) if slot.kind in LOW_RANK else (spell(slot),)


def partner(name: str) -> str | None:
    """The other half's name; None for a tensor that has no other half."""
    slot, half = _read(name)
    return None if half is None else spell(slot, Half.UP if half is Half.DOWN else Half.DOWN)


def pair_names(part: Part, module: str) -> tuple[str, str]:
    """(down, up) of a low-rank residual on the projection `module` of a network."""
    return _both(Slot(part, module, Kind.PAIR))


def causal_names(part: Part, module: str) -> tuple[str, str]:
    """(down, up) of a residual on a text encoder that acts from the concept's own word on."""
    return _both(Slot(part, module, Kind.CAUSAL))


def context_names(block: str) -> tuple[str, str]:
    """(down, up) of a residual on the text states that one transformer block of the UNet reads."""
    return _both(Slot(UNET, block, Kind.CONTEXT))


def value_name(part: Part, parameter: str) -> str:
    """The name of a parameter's whole new value."""
    return spell(Slot(part, parameter, Kind.VALUE))


def difference_name(part: Part, parameter: str) -> str:
    """The name of a difference to add to a parameter."""
    return spell(Slot(part, parameter, Kind.DIFFERENCE))


def word_name(encoder: int, word: str) -> str:
    """The name of a learned word's rows for the text encoder of this number."""
    if not 0 <= encoder < len(TEXT_PARTS):
        raise ValueError(f"text encoder {encoder} of the word {word!r}: they are numbered 0 to {len(TEXT_PARTS) - 1}")
    return spell(Slot(TEXT_PARTS[encoder], word, Kind.WORD))


def on_unet(name: str) -> bool:
    """Whether a tensor or a residual of this name belongs to the UNet's own layers; not the text states it reads."""
    return name.startswith(f"{UNET}.")


def is_word(name: str) -> bool:
    """Whether a tensor's name says a learned word's rows."""
    return name.startswith(WORD_PREFIX)


def _both(slot: Slot) -> tuple[str, str]:
    return spell(slot, Half.DOWN), spell(slot, Half.UP)


def _ended(text: str, endings: dict[Half, str]) -> tuple[str, Half | None]:
    """A name without the ending of a half, and that half."""
    for half, ending in endings.items():
        if text.endswith(ending):
            return text.removesuffix(ending), half
    return text, None


def _read(name: str) -> tuple[Slot, Half | None]:
    slot, half = _forms(name)
    if slot is None:
        starts = ", ".join(f"{part}." for part in PARTS)
        raise ValueError(
            f"{name!r} does not name a tensor of a concept; expected {starts}, {CONTEXT_PREFIX} or {WORD_PREFIX} and "
            "the layer, the parameter or the word"
        )
    return slot, half


def _forms(name: str) -> tuple[Slot | None, Half | None]:
    """The slot and the half of a name; None for the slot where the name has no form of the grammar."""
    start, _, rest = name.partition(".")
    if name.startswith(WORD_PREFIX):
        number, _, word = rest.partition(".")
        found = [part for e, part in enumerate(TEXT_PARTS) if number == str(e)]
        return (Slot(found[0], word, Kind.WORD) if found and word else None), None
    if name.startswith(CONTEXT_PREFIX):
        block, half = _ended(rest, PAIR_ENDINGS)
        return (Slot(UNET, block, Kind.CONTEXT) if half is not None and _dotted(block) else None), half
    part: Part | None = next((part for part in PARTS if part == start), None)
    if part is None:
        return None, None
    kind = Kind.CAUSAL
    layer, half = _ended(rest, CAUSAL_ENDINGS)
    if half is None:
        kind = Kind.PAIR
        layer, half = _ended(rest, PAIR_ENDINGS)
    if half is None:
        kind = Kind.DIFFERENCE if rest.endswith(DIFFERENCE_ENDING) else Kind.VALUE
        layer = rest.removesuffix(DIFFERENCE_ENDING)
    # The UNet reads no tokens, so nothing on it can act from a word on.
    known = _dotted(layer) and not (kind is Kind.CAUSAL and part == UNET)
    return (Slot(part, layer, kind) if known else None), half


def _dotted(layer: str) -> bool:
    """Whether a layer's name is one or more parts with single dots between them."""
    return all(layer.split("."))
