"""Concept: what was learned, apart from the model it was learned on, and its one safetensors file.

How its tensors are named, and where each belongs, is in grammar.py.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..files import read_safetensors, write_safetensors
from ..model.tokens import with_word
from .checking import as_numbers, check_pairs, check_record, check_word, check_words
from .grammar import TEXT_PARTS, Half, Kind, Part, Slot, half_of, names, parse, partner, word_name
from .header import OTHER_TOOLS, header
from .header import Kind as FileKind

if TYPE_CHECKING:
    from ..model.model import Model
    from .formats.writing import Report

FORMAT, VERSION = "pcs_concept", "1"  # in every concept file's header


def subject_words(token: str, class_word: str) -> str:
    """The words that name a subject in a prompt: "<mug> mug", or those of the two that there are."""
    return " ".join(filter(None, (token, class_word)))


@dataclass
class Concept:
    """A learned subject.

    method: how it was learned. tensors: by the names of grammar.py. words: each learned word's token embeddings
    [rows, width], one tensor for each text encoder. meta: its record. base: the fingerprint of the base model.
    """

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
        """The class of the subject: "mug"."""
        return self.meta.get("class_word", "")

    @property
    def subject_words(self) -> str:
        """How a prompt names what was learned: "<mug> mug"; of several subjects, all of them."""
        return " and ".join(filter(None, self.names))

    @property
    def subjects(self) -> list[tuple[str, str]]:
        """(token, class word) of every subject that was learned together; at least one."""
        stored = json.loads(self.meta.get("subjects") or "[]")
        return [(token, class_word) for token, class_word in stored] or [(self.token, self.class_word)]

    @property
    def names(self) -> list[str]:
        """How a prompt names each of the subjects: by token and class, or as its training's prompts did."""
        stored: list[str] = json.loads(self.meta.get("names") or "[]")
        return stored if len(stored) == len(self.subjects) else [subject_words(*subject) for subject in self.subjects]

    def of_subject(self, number: int) -> Concept:
        """The same concept, spoken of as one of its subjects: its token, class word and prompt are that one's."""
        if len(self.subjects) == 1:
            return self
        (token, class_word), name = self.subjects[number], self.names[number]
        prompt = self.instance_prompt
        if (token, class_word) != (self.token, self.class_word):
            mine = self.names[self.subjects.index((self.token, self.class_word))] if self.token else ""
            prompt = prompt.replace(mine, name, 1) if mine and mine in prompt else f"a photo of a {name}"
        own = {"token": token, "class_word": class_word, "instance_prompt": prompt}
        own |= {"subjects": json.dumps([[token, class_word]]), "names": json.dumps([name])}
        return replace(self, meta=self.meta | own)

    @property
    def instance_prompt(self) -> str:
        """A prompt for the subject alone."""
        return self.meta.get("instance_prompt") or " ".join(filter(None, ("a photo of a", self.subject_words)))

    @property
    def key(self) -> str:
        """What the concept is called beside others on a model."""
        return self.token or self.meta.get("title", "") or self.method

    @property
    def hold_first(self) -> bool:
        """Whether the text's first token, and the empty prompt, stay as the frozen encoder makes them."""
        return self.meta.get("hold_first") == "1"

    @property
    def small_noise(self) -> float | None:
        """The variance of the noise on the small picture that an up-scaler was trained with, where this is of one."""
        settings = json.loads(self.meta.get("settings") or "{}")
        return float(settings.get("noise_level") or 0.0) if settings.get("stage") == "super_resolution" else None

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        tensors = [*self.tensors.values(), *(t for rows in self.words.values() for t in rows)]
        return sum(t.numel() for t in tensors)

    def residuals(self) -> dict[Slot, tuple[Tensor, Tensor]]:
        """The low-rank residuals: where each belongs -> (down, up)."""
        found = {}
        for name, down in self.tensors.items():
            if half_of(name) is Half.DOWN:
                slot = parse(name)
                found[slot] = (down, self.tensors[names(slot)[1]])
        return found

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The low-rank residuals by `Slot.stem`: a name without its half; that of a causal one ends in ".causal"."""
        return {slot.stem: pair for slot, pair in self.residuals().items()}

    def wholes(self) -> dict[str, Tensor]:
        """The tensors, by name, that are whole values or differences of parameters."""
        return {name: t for name, t in self.tensors.items() if half_of(name) is None}

    def changes(self) -> dict[Slot, Tensor]:
        """The whole values and differences of parameters: where each belongs -> its tensor."""
        return {parse(name): t for name, t in self.wholes().items()}

    def touches(self, parts: Sequence[Part]) -> bool:
        """Whether a residual, a value or a difference sits on one of these networks."""
        return any(slot.part in parts for slot in map(parse, self.tensors) if slot.kind is not Kind.CONTEXT)

    def described(self, kind: FileKind | None = None) -> dict[str, str]:
        """The header fields by which other tools show the concept.

        kind: what the file is; None tells it by what the concept holds.
        """
        kind = kind or ("lora" if self.tensors else "textual-inversion")
        ranks = {len(t) for name, t in self.tensors.items() if half_of(name) is Half.DOWN}
        return header(self.names[0], f"{self.key} ({self.method})", sorted(ranks), self.meta, kind)

    def renamed(self, token: str, of: str = "") -> Concept:
        """The same concept under another word.

        Args:
            token: the new word.
            of: which of several subjects is renamed, by its word; default: the first of those learned together.

        Raises:
            ValueError: no subject is called `of`, it is not said which of several, the new word cannot be one or names
                something already, or the old word is not a learned one: the model itself was changed for it.
        """
        check_word(token)
        old, known = of or self.token, [word for word, _ in self.subjects if word]
        if (of and of not in known) or (not old and known):
            raise ValueError(
                f"{self.key} has the subjects {', '.join(map(repr, known)) or 'without words'}, and not {of!r}; "
                "say which one is renamed by of=..."
            )
        if old == token:
            return self
        if token in known or token in self.words:
            raise ValueError(f"{self.key} has the word {token!r} already; choose another for {old!r}")
        # Concepts of version 0.1.0, blended and merged ones keep no record of how a word was chosen; their rows do.
        if old and old not in self.words:
            raise ValueError(
                f"{old!r} is a word of the tokenizer and not a learned one: the model was changed for it, so another "
                "word would mean nothing; it has no other name"
            )
        words = {token if w == old else w: rows for w, rows in self.words.items()}
        prompt = with_word(self.instance_prompt, old, token) if old else f"a photo of a {token}"
        meta = self.meta | {"instance_prompt": prompt} | ({"token": token} if old == self.token else {})
        if "subjects" in meta:
            meta["subjects"] = json.dumps([[token if t == old else t, word] for t, word in self.subjects])
        if "names" in meta:
            meta["names"] = json.dumps([with_word(name, old, token) for name in self.names])
        return replace(self, words=words, meta=meta)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all."""
        tensors = dict(self.tensors)
        for word, rows in self.words.items():
            tensors |= {word_name(e, word): r for e, r in enumerate(rows)}
        own = {"format": FORMAT, "version": VERSION, "method": self.method, "base": self.base}
        return write_safetensors(Path(path), tensors, self.described() | self.meta | own)

    @staticmethod
    def load(path: str | Path, model: Model | None = None, force: bool = False) -> Concept:
        """`load_concept`, which see."""
        from .loading import load_concept

        return load_concept(path, model, force)

    def compress(self, ratio: float = 0.6, model: Model | None = None) -> Concept:
        """`pcs_trainer.compress`, which see."""
        from .compression import compress

        return compress(self, model, ratio)

    def export(self, folder: str | Path, format: str = "diffusers", **options: Any) -> Report:
        """`pcs_trainer.export`, which see."""
        from .formats.writing import export

        return export(self, folder, format, **options)


def read_concept(path: Path) -> Concept:
    """A concept from its own file, not compared with any model.

    Raises ValueError, one sentence, for a file of another kind or with a tensor that has no place in a concept.
    """
    tensors, fields = read_safetensors(path)
    if fields.get("format") != FORMAT:
        raise ValueError(f"{path} is not a concept file; to load a LoRA or an embedding, use import_concept()")
    check_record(path, fields, VERSION)
    words: dict[str, dict[Part, Tensor]] = defaultdict(dict)
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        try:
            slot, other = parse(name), partner(name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if other is not None and other not in tensors:
            raise ValueError(f"{path}: the tensor {name!r} has no partner {other!r}; the file is incomplete")
        tensor = as_numbers(path, name, tensor)
        if slot.kind is Kind.WORD:
            words[slot.layer][slot.part] = tensor
        else:
            kept[name] = tensor
    check_pairs(path, kept)
    check_words(path, words)
    rows = {word: [parts[part] for part in TEXT_PARTS if part in parts] for word, parts in words.items()}
    meta = {name: value for name, value in fields.items() if not name.startswith(OTHER_TOOLS)}
    base, method = meta.pop("base", ""), meta.pop("method", "unknown")
    for own in ("format", "version"):
        meta.pop(own, None)
    return Concept(method, kept, rows, meta, base)
