"""What was learned, apart from the model it was learned on: a Concept, its one file, and putting it on a model.

Tensors are named by where they go:
    unet.{module}.down [R, C_in], unet.{module}.up [C_out, R]   a low-rank residual on a projection
    unet.{parameter}                                          the whole new value of a parameter
    unet.{parameter}.diff                                     a difference to add to it
and the same under text_encoder. and text_encoder_2.; TextBoost's causal form has .causal_down / .causal_up there, and
context.{block}.down / .up for the states that one transformer block reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..model.fingerprint import fingerprint, same_base
from ..model.text import encode
from ..model.text_adapters import TextLowRank, attach_context, attach_text, detach_text, file_name
from ..unet.layers import LowRank, replace_data

if TYPE_CHECKING:
    from ..model.model import Model
    from .formats.writing import Report

PAIRS = {".down": ".up", ".causal_down": ".causal_up"}


@dataclass
class Concept:
    """A learned subject: its tensors, its words' rows (one tensor for each text encoder), how it was made, on what."""

    method: str
    tensors: dict[str, Tensor]
    words: dict[str, list[Tensor]] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)
    base: str = ""

    @property
    def token(self) -> str:
        """The word that names the subject: a learned one, a rare one, or none."""
        return self.meta.get("token", "")

    @property
    def class_word(self) -> str:
        return self.meta.get("class_word", "")

    @property
    def instance_prompt(self) -> str:
        given = self.meta.get("instance_prompt")
        return given or " ".join(["a photo of a", *filter(None, (self.token, self.class_word))])

    @property
    def key(self) -> str:
        return self.token or self.meta.get("title", "") or self.method

    @property
    def hold_first(self) -> bool:
        """Whether the text's first token, and the empty prompt, stay as the frozen encoder makes them."""
        return self.meta.get("hold_first") == "1"

    @property
    def parameters(self) -> int:
        """How many numbers were learned."""
        tensors = [*self.tensors.values(), *(t for rows in self.words.values() for t in rows)]
        return sum(t.numel() for t in tensors)

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The low-rank residuals: name without its ending -> (down, up); a causal one ends in ".causal"."""
        found = {}
        for name, down in self.tensors.items():
            for ending, other in PAIRS.items():
                if name.endswith(ending):
                    stem = name.removesuffix(ending)
                    label = stem if ending == ".down" else f"{stem}.causal"
                    found[label] = (down, self.tensors[stem + other])
        return found

    def wholes(self) -> dict[str, Tensor]:
        """The tensors that are whole values or differences of parameters."""
        endings = tuple(PAIRS) + tuple(PAIRS.values())
        return {n: t for n, t in self.tensors.items() if not n.endswith(endings)}

    def renamed(self, token: str) -> Concept:
        """The same concept under another word."""
        words = {token if w == self.token else w: rows for w, rows in self.words.items()}
        prompt = self.instance_prompt.replace(self.token, token) if self.token else f"a photo of a {token}"
        return replace(self, words=words, meta=self.meta | {"token": token, "instance_prompt": prompt})

    def save(self, path: str | Path) -> Path:
        """One safetensors file, written whole or not at all."""
        from .file import save_concept

        return save_concept(self, Path(path))

    @staticmethod
    def load(path: str | Path, model: Model | None = None, force: bool = False) -> Concept:
        return load_concept(path, model, force)

    def compress(self, ratio: float = 0.6, model: Model | None = None) -> Concept:
        """The same with low-rank factors for whole weights, keeping this share of their singular values' sum."""
        from .merging import compress

        return compress(self, model, ratio)

    def export(self, folder: str | Path, format: str = "diffusers", **options: Any) -> Report:
        """Files that other tools load: "diffusers", "kohya" or "pipeline"."""
        from .formats.writing import export

        return export(self, folder, format, **options)


def load_concept(path: str | Path, model: Model | None = None, force: bool = False) -> Concept:
    """A concept from its file; with a model, refused where another one made it (unless forced) or it does nothing."""
    from .file import read_concept

    concept = read_concept(Path(path))
    if model is not None:
        if not force:
            check_base(concept, model, str(path))
        check_fits(concept, model, str(path))
        if not differs(model, concept):
            raise ValueError(f"{path} changes nothing on this model: its prediction is the base model's, bit for bit")
    return concept


def check_base(concept: Concept, model: Model, name: str) -> None:
    if concept.base and not same_base(concept.base, fingerprint(model)):
        made_on = concept.meta.get("base_name", "another model")
        raise ValueError(
            f"{name} was made on {made_on}, not on {model.name}; load it on that one, or force=True to try all the same"
        )


def check_fits(concept: Concept, model: Model, name: str) -> None:
    """Every tensor has a place of its shape on the model, or one sentence says which has not."""
    for stem, (down, up) in concept.pairs().items():
        part, _, module = stem.removesuffix(".causal").partition(".")
        if part == "context":
            continue
        weight = _parameters(model, part, name).get(f"{module}.weight")
        if weight is None or tuple(weight.shape[:2]) != (up.shape[0], down.shape[1]):
            raise ValueError(f"{name}: this model has no projection {stem!r} of {down.shape[1]} to {up.shape[0]}")
    for full, tensor in concept.wholes().items():
        part, _, parameter = full.removesuffix(".diff").partition(".")
        weight = _parameters(model, part, name).get(parameter)
        if weight is None or weight.shape != tensor.shape:
            raise ValueError(f"{name}: this model has no parameter {full!r} of shape {tuple(tensor.shape)}")
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in model.text_encoders]
    for word, rows in concept.words.items():
        if [r.shape[1] for r in rows] != widths:
            raise ValueError(f"{name}: the rows of {word!r} do not have this model's text width {widths}")


def part_of(model: Model, part: str) -> nn.Module:
    """unet, text_encoder or text_encoder_2."""
    if part == "unet":
        return model.unet
    number = {"text_encoder": 0, "text_encoder_2": 1}.get(part)
    if number is None or number >= len(model.text_encoders):
        raise ValueError(f"this model has no part {part!r}")
    return model.text_encoders[number]


def _parameters(model: Model, part: str, name: str) -> dict[str, nn.Parameter]:
    """A part's parameters under the names that checkpoint files give them."""
    try:
        module = part_of(model, part)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    rename = (lambda n: n) if part == "unet" else file_name
    return {rename(n): p for n, p in module.named_parameters()}


@contextmanager
def attached(
    model: Model, concepts: Sequence[Concept], strengths: Sequence[float] | None = None
) -> Iterator[dict[str, list[Tensor]]]:
    """Put concepts on a model and take them off again; yields their learned words.

    Whole values are blended: base + sum of strength * (value - base); strength scales a residual; words have none.
    """
    strengths = [1.0] * len(concepts) if strengths is None else list(strengths)
    if len(strengths) != len(concepts):
        raise ValueError(f"{len(concepts)} concepts and {len(strengths)} strengths: give one strength for each concept")
    kept: dict[nn.Parameter, Tensor] = {}
    keys: list[str] = []
    words: dict[str, list[Tensor]] = {}
    try:
        for concept, strength in zip(concepts, strengths, strict=True):
            if concept.key in keys:
                raise ValueError(f"two concepts are called {concept.key!r}: give one another name with .renamed(...)")
            keys.append(concept.key)
            words.update(_own_words(concept, words))
            _put_pairs(model, concept, strength)
        _put_wholes(model, concepts, strengths, kept)
        yield words
    finally:
        for key in keys:
            model.unet.detach(key)
            for encoder in model.text_encoders:
                detach_text(encoder, key)
        for parameter, value in kept.items():
            replace_data(parameter, value)


def _own_words(concept: Concept, taken: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    for word in concept.words:
        if word in taken:
            raise ValueError(f"two concepts both use the word {word!r}: give one another name with .renamed(...)")
    return concept.words


def _put_pairs(model: Model, concept: Concept, strength: float) -> None:
    for stem, (down, up) in concept.pairs().items():
        part, _, module = stem.removesuffix(".causal").partition(".")
        device = model.unet.conv_in.weight.device
        down, up = (t.to(device, t.dtype if t.dtype == torch.bfloat16 else torch.float32) for t in (down, up))
        if part == "unet":
            model.unet.attach(module, LowRank(down, up, strength, key=concept.key))
            continue
        reach = concept.token if part == "context" or stem.endswith(".causal") else ""
        residual = TextLowRank(down, up, strength, concept.key, reach)
        if part == "context":
            attach_context(model.text_encoder, module, residual)
        else:
            attach_text(part_of(model, part), module, residual)


def _put_wholes(
    model: Model, concepts: Sequence[Concept], strengths: Sequence[float], kept: dict[nn.Parameter, Tensor]
) -> None:
    changes: dict[nn.Parameter, list[tuple[float, Tensor, bool]]] = defaultdict(list)
    by_part: dict[str, dict[str, nn.Parameter]] = {}
    for concept, strength in zip(concepts, strengths, strict=True):
        for full, tensor in concept.wholes().items():
            part, _, name = full.removesuffix(".diff").partition(".")
            if part not in by_part:
                by_part[part] = _parameters(model, part, concept.key)
            changes[by_part[part][name]].append((strength, tensor, full.endswith(".diff")))
    with torch.no_grad():
        for parameter, parts in changes.items():
            kept[parameter] = parameter.data
            if len(parts) == 1 and parts[0][0] == 1.0 and not parts[0][2]:
                new = parts[0][1]
            else:
                base = parameter.data.float()
                new = base.clone()
                for strength, tensor, is_difference in parts:
                    tensor = tensor.to(base)
                    new += strength * (tensor if is_difference else tensor - base)
            replace_data(parameter, new.to(device=parameter.device, dtype=parameter.dtype))


@torch.no_grad()
def predict(
    model: Model, concepts: Sequence[Concept], prompt: str, strength: float = 1.0,
    words: dict[str, list[Tensor]] | None = None, hold_first: bool = False,
) -> Tensor:  # fmt: skip
    """One prediction for fixed noise: what tells whether a concept does anything, and whether two do the same."""
    settings = model.unet.settings
    side = min(16, int(model.unet.config.get("sample_size") or 16))
    generator = torch.Generator().manual_seed(0)
    weight = model.unet.conv_in.weight
    x = torch.randn(1, settings["in_channels"], side, side, generator=generator).to(weight)
    with attached(model, concepts, [strength] * len(concepts)) as theirs:
        hold_first = hold_first or any(c.hold_first for c in concepts)
        text = encode(model, [prompt], (words or {}) | theirs, hold_first).to(weight)
        context = model.unet.text_kv(text.states)
        added = text.added(8 * side, 8 * side) or {}
        if model.unet.class_embedding is not None:
            added["class_labels"] = torch.zeros(1, dtype=torch.long, device=weight.device)
        return model.unet(x, torch.tensor([len(model.schedule) // 2]), context, added)


def differs(model: Model, concept: Concept) -> bool:
    """Whether the concept changes a prediction; the other side is computed by the same operations, at strength 0."""
    without = replace(concept, words={})
    prompt = concept.instance_prompt
    return not torch.equal(predict(model, [concept], prompt), predict(model, [without], prompt, strength=0.0))
