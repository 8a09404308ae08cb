"""What a run learns: a method's setup says what trains; the learner names it, attaches it and takes it off."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..concept import grammar
from ..concept.grammar import Kind, Slot
from ..data.prompts import Vocabulary
from ..distributed import full_value, is_part
from ..model.model import Model
from ..model.text_adapters import TextLowRank, attach_context, attach_text, detach_text, without_adapters
from ..settings import Settings
from ..unet.layers import Conv2d, Linear, LowRank, device_of, place, replace_data
from ..unet.streaming import at_hand

KEY = "learning"  # the residuals of the running training, among those of concepts on the same model

# "both_random": the product's entries start at a hundredth of a projection's own (about C_in ** -0.5).
SMALL_START = 0.01


class Pair(NamedTuple):
    """A low-rank residual's parameters: down [R, C_in], up [C_out, R]. One without requires_grad stays as it is."""

    down: nn.Parameter
    up: nn.Parameter


@dataclass
class Word:
    """A learned word: its token embeddings, one tensor [n, width] for each text encoder."""

    rows: list[Tensor]
    trained: bool
    kept: bool = True  # part of the concept; a word that only serves training is not


class Learner:
    """Everything that trains, by the names that the concept's file gives it.

    Args:
        model: what the method's setup works on.
        seed: of the random starts.
        vocabulary: what learned words start from; None is the model's own tokenizers and embedding tables.
    """

    def __init__(self, model: Model, seed: int = 0, vocabulary: Vocabulary | None = None) -> None:
        self.model = model
        self.vocabulary = vocabulary or Vocabulary(model)
        self.generator = torch.Generator().manual_seed(seed)
        self.weights: dict[str, nn.Parameter] = {}
        self.fixed: dict[str, Tensor] = {}  # halves of residuals that stay as drawn: in the concept, not trained
        self.words: dict[str, Word] = {}
        self.indifferent: set[str] = set()  # weights that nothing depends on: trained, and no proof asks for them
        self.hold_first = False  # the first token, and the empty prompt, stay as the frozen text encoder makes them
        self.trains_whole_network = False  # several processes share it instead of each holding all
        self.originals: list[Tensor] = []  # values of the model that are put back in the end; not on a GPU
        self._undo: list[Callable[[], Any]] = []
        self._sides: set[str] = set()  # where residuals have been attached
        self._base: dict[nn.Parameter, Tensor] = {}  # the values that trained parameters of the model had before

    # told by a method's setup

    def attach(self, part: grammar.Part, layer: str, pair: Pair) -> None:
        """Train a low-rank residual on one projection of the UNet or of a text encoder."""
        self._attach(Slot(part, layer, Kind.PAIR), pair)

    def attach_from_word_on(self, part: grammar.Part, layer: str, pair: Pair, word: str) -> None:
        """Train a residual on a text encoder's layer that acts on the tokens from `word` on."""
        self._attach(Slot(part, layer, Kind.CAUSAL), pair, word)

    def attach_context(self, block: str, pair: Pair, word: str) -> None:
        """Train a residual on the text states that one transformer block of the UNet reads, from `word` on."""
        self._attach(Slot(grammar.UNET, block, Kind.CONTEXT), pair, word)

    def train_value(self, name: str, parameter: nn.Parameter, *, master: bool) -> None:
        """Train a parameter of the model itself; `master` holds it in float32 while it trains.

        One that is held in 8 bits is read again as it was; one that is streamed comes to the device.
        """
        part, _, own_name = name.partition(".")
        if part == grammar.UNET:
            self._undo += at_hand(self.model.unet, own_name)
        value = parameter.data
        original = on_host(value)
        self.originals.append(original)
        replace_data(parameter, value.float().clone() if master else value.clone())
        parameter.requires_grad_(True)
        self.weights[name] = parameter
        self._base[parameter] = original

        def undo() -> None:
            parameter.requires_grad_(False)
            parameter.grad = None
            replace_data(parameter, original.to(parameter.device))  # where it is by now: networks take turns

        self._undo.append(undo)

    def train_whole_unet(self) -> None:
        """Train every parameter of the UNet in place: no copy is kept, the model's files are read again afterwards."""
        whole = {grammar.value_name("unet", name): p for name, p in self.model.unet.named_parameters()}
        for parameter in whole.values():
            parameter.requires_grad_(True)
        self.weights |= whole
        self.trains_whole_network = True
        self.model.unet.forget_derived()

        def undo() -> None:
            self.model.release("unet")
            for name in whole:  # a second network would stay in memory beside the one that is read again
                self.weights.pop(name, None)
            whole.clear()

        self._undo.append(undo)

    def add_word(self, word: str, rows: Sequence[Tensor], *, trained: bool, kept: bool = True) -> None:
        """Give the run a word of its own; its trained rows are parameters apart from any embedding table."""
        if word in self.words:
            raise ValueError(f"the word {word!r} is used twice in this run; choose another token")
        self.words[word] = Word([nn.Parameter(r) for r in rows] if trained else list(rows), trained, kept)

    def add_subject_word(self, s: Settings) -> None:
        """The subject's word, if it is a learned one, from what it starts from: `init_word`, or a rare word."""
        if s.identifier == "learned":
            self.add_word(s.token, self.vocabulary.starting_rows(s), trained=s.train_token)

    # asked by what runs it

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every tensor that trains: the weights, then the words' rows."""
        return self.weights | self.groups()[1]

    def groups(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """(weights, token embeddings): two learning rates."""
        rows = {
            grammar.word_name(e, name): row
            for name, word in self.words.items()
            for e, row in enumerate(word.rows)
            if isinstance(row, nn.Parameter)
        }
        return dict(self.weights), rows

    @property
    def rows(self) -> dict[str, list[Tensor]]:
        """Word -> its token embeddings, as `encode` takes them."""
        return {name: word.rows for name, word in self.words.items()}

    @property
    def text_trains(self) -> bool:
        """Whether the text states have a gradient, so that they are computed in every step."""
        outside = any(not grammar.on_unet(name) for name in self.weights)
        return outside or any(word.trained for word in self.words.values())

    def unreached(self, prompts: Collection[str]) -> list[str]:
        """The trained token embeddings whose word stands in none of these prompts."""
        found = []
        for name, word in self.words.items():
            whole = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")  # "cat" is no part of "category"
            if word.trained and not any(whole.search(prompt) for prompt in prompts):
                found += [grammar.word_name(e, name) for e in range(len(word.rows))]
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What the concept takes beside its words; whole values also where several processes hold the parts.

        A network that trained whole gives its own tensors, as there is no other use for them than to be read again.
        """
        return {name: self._given(p) for name, p in (self.weights | self.fixed).items()}

    def _given(self, p: Tensor) -> Tensor:
        if self.trains_whole_network and isinstance(p, nn.Parameter) and p.device.type == "cpu" and not is_part(p):
            replace_data(p, p.detach().contiguous())
            return p.detach()
        return full_value(p.detach()).cpu().clone(memory_format=torch.contiguous_format)

    def kept_rows(self) -> dict[str, list[Tensor]]:
        """The token embeddings that belong to the concept, on the CPU."""
        return {n: [r.detach().clone().cpu() for r in w.rows] for n, w in self.words.items() if w.kept}

    def come_to(self, device: str) -> None:
        """Bring what trains, before an optimizer has seen it, and all words to a device."""
        for p in self.parameters.values():
            place(p, p.data.to(device))
        for word in self.words.values():
            word.rows = [r if isinstance(r, nn.Parameter) else r.to(device) for r in word.rows]

    def take_parts(self, parts: dict[str, nn.Parameter]) -> None:
        """Train these parts of tensors in place of the whole ones (several processes share a network)."""
        self.weights |= parts

    @property
    def holds(self) -> bool:
        """Whether anything of it is on the model."""
        return bool(self._undo)

    def keep_base(self) -> None:
        """Copy what a whole-network run changes in place, so that `base` has the model as it was."""
        if self.trains_whole_network:
            trained = [p for n, p in self.weights.items() if grammar.on_unet(n) and p not in self._base]
            self._base |= {p: p.detach().clone() for p in trained}  # once: later they are no longer the base model's

    @contextmanager
    def base(self) -> Iterator[None]:
        """The UNet and the text encoders as they were before setup, for as long as the context is open.

        A network that trains whole has to be kept by `keep_base` before its first step.
        """
        layers = [m for m in self.model.unet.modules() if isinstance(m, (Linear, Conv2d)) and m.residuals]
        attached = [layer.residuals for layer in layers]
        now = {parameter: parameter.data for parameter in self._base}
        dtype = self.model.unet.conv_in.weight.dtype  # float32 while float16 gradients are compared
        with ExitStack() as stack:
            if "text" in self._sides:
                for encoder in self.model.text_encoders:
                    stack.enter_context(without_adapters(encoder))
            try:
                for layer in layers:
                    layer.residuals = [r for r in layer.residuals if r.key != KEY]
                for parameter, value in self._base.items():
                    replace_data(parameter, value.to(parameter.device, dtype))
                yield
            finally:
                for parameter, value in now.items():
                    replace_data(parameter, value)
                for layer, residuals in zip(layers, attached, strict=True):
                    layer.residuals = residuals

    def restore(self) -> None:
        """The model as it was before setup."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self.originals.clear()
        self._sides.clear()
        self._base.clear()

    def _attach(self, slot: Slot, pair: Pair, word: str = "") -> None:
        model = self.model
        if slot.kind is Kind.CONTEXT:
            attach_context(model.text_encoder, slot.layer, TextLowRank(*pair, 1.0, KEY, word))
        elif slot.part == grammar.UNET:
            model.unet.attach(slot.layer, LowRank(*pair, key=KEY))
        else:
            encoder = model.text_encoders[grammar.TEXT_PARTS.index(slot.part)]
            attach_text(encoder, slot.layer, TextLowRank(*pair, 1.0, KEY, word))
        self._detach_at_the_end("unet" if slot.kind is Kind.PAIR and slot.part == grammar.UNET else "text")
        for name, half in zip(grammar.names(slot), pair, strict=True):
            if half.requires_grad:
                self.weights[name] = half
            else:
                self.fixed[name] = half

    def _detach_at_the_end(self, side: Literal["unet", "text"]) -> None:
        if side in self._sides:
            return
        self._sides.add(side)
        model = self.model
        if side == "unet":
            self._undo.append(lambda: model.unet.detach(KEY))
        else:
            self._undo += [lambda e=encoder: detach_text(e, KEY) for encoder in model.text_encoders]


def on_host(value: Tensor) -> Tensor:
    """The value in the machine's memory; itself where it is there, or has no contents."""
    return value if value.device.type in ("cpu", "meta") else value.cpu()


def fresh_pair(
    layer: nn.Module,
    rank: int,
    init: Literal["zero_up", "both_random"],
    generator: torch.Generator,
    spread: float | None = None,
) -> Pair:
    """A residual for a projection: down ~ N(0, spread^2), up = 0 ("zero_up") or small ("both_random").

    `spread` is rank^-0.5 where it is not given: down^T down is then the identity in the mean, whatever the rank. PEFT's
    "gaussian" is 1 / rank. Adam's step of W is proportional to it, so learning rates of one do not suit the other.
    """
    assert isinstance(layer.weight, Tensor)
    c_out, c_in = layer.weight.shape[:2]
    device = device_of(layer) if isinstance(layer, (Linear, Conv2d)) else layer.weight.device
    down = torch.randn(rank, c_in, generator=generator) * (rank**-0.5 if spread is None else spread)
    up = torch.zeros(c_out, rank)
    if init == "both_random":
        up = torch.randn(c_out, rank, generator=generator) * SMALL_START * c_in**-0.5
    return Pair(nn.Parameter(down.to(device)), nn.Parameter(up.to(device)))
