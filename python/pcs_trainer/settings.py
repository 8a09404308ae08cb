"""The settings that every method has. What one method alone has is a subclass beside it, in methods/."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Identifier = Literal["rare", "learned", "plain"]
Schedule = Literal["constant", "cosine", "linear"]

# At least 1, and at least 0.
COUNTS = ("steps", "batch", "accumulate", "keep", "token_vectors", "bank", "prior_images", "rank")
AMOUNTS = (
    "token_learning_rate",
    "clip_norm",
    "snr_gamma",
    "prior_weight",
    "preservation_weight",
    "weight_decay",
    "warmup",
    "checkpoint_every",
    "preview_every",
    "probe_every",
    "resolution",
)

# Beyond these a number was mistyped: no run of that size would end, and it would be found out after hours or never.
MOST = {
    "steps": 10_000_000,
    "batch": 10_000,
    "accumulate": 10_000,
    "bank": 100_000,
    "prior_images": 100_000,
    "prior_steps": 1000,
    "rank": 100_000,
    "token_vectors": 77,  # tokens that a text encoder reads
    "resolution": 16_384,
}
SEEDS = 1 << 32  # as NumPy's; the optimizer multiplies a seed by a million and must stay below 2^63


@dataclass(kw_only=True)
class Settings:
    """One run. A method's subclass gives its paper's values as defaults, and adds what it alone has.

    None means that the method, the model or the identifier chooses.
    """

    method: str = ""
    class_word: str = ""
    token: str = ""  # what names the subject; "" lets the identifier choose
    identifier: Identifier = "learned"  # rare: the tokenizer's word; learned: a new word; plain: the user's own words
    train_token: bool = False  # whether the learned word's token embeddings train
    token_vectors: int = 1  # token embeddings of a learned word; no fewer than what it starts from has
    init_word: str | None = None  # what a learned word starts from; None is a rare word
    # The prompt of a photo, or several, one of which is drawn for each photo of a step. {subject} is token and class,
    # {token} the token alone.
    template: str | tuple[str, ...] = "a photo of a {subject}"
    class_template: str = "a photo of a {class}"
    flip: bool = False  # every photo and class image also mirrored: half of what is trained on
    crop: Literal["center", "random"] = "center"  # which square of a photo that is none; random: several of them
    resolution: int | None = None  # pixels a side; None is the model's native size
    steps: int = 150
    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-3
    token_learning_rate: float | None = None  # None is learning_rate
    lr_schedule: Schedule = "constant"
    warmup: int = 0
    weight_decay: float = 1e-2
    clip_norm: float = 1.0  # of all gradients together; 0 is off
    clip: Literal["previous", "two_pass"] = "previous"  # which norm clips, with the optimizer step in the backward
    snr_gamma: float = 0.0  # min-SNR weight; 0 is off
    timesteps: Literal["uniform", "snr"] = "uniform"  # snr: p(t) grows with the noise
    prior_weight: float = 0.0  # of the loss on class images; 0 is off
    prior: Literal["drawn", "own"] = "drawn"  # class images, or the frozen model's own prediction for the class prompt
    prior_images: int = 100
    prior_folder: str | None = None  # class images with captions beside them or in lists; None: the model draws them
    prior_steps: int = 25  # sampling steps of a generated class image
    optimizer: Literal["adamw8bit", "adamw"] = "adamw8bit"
    states: Literal["device", "streamed"] = "device"  # streamed: 8-bit optimizer states wait in RAM between updates
    step_in_backward: bool = False  # update each parameter inside the backward pass, and free its gradient
    seed: int = 0
    plan: str | dict[str, str] = "A"  # recomputation plan of the UNet, or of its layers by leading part of their names
    weights: Literal["full", "int8"] = "full"  # the UNet's frozen weights: as they are, or in 8 bits
    resident: Literal["device", "streamed"] = "device"  # streamed: frozen weights wait in RAM, copied ahead of use
    offload: bool = False  # GPU: text encoders, UNet and autoencoder take turns on it; who does not work waits in RAM
    graph: Literal["auto", "off"] = "auto"  # NVIDIA GPUs: record a step as a CUDA graph and replay it
    packing: Literal["both", "forward", "none"] = "both"  # CPU: directions in which frozen weights are kept packed
    checkpoint_every: int = 0  # 0: at the end of the run alone
    keep: int = 2
    preview_every: int = 0
    preview_prompts: tuple[str, ...] = ()
    probe_every: int = 50  # steps between measurements of the held-out loss and the class drift; 0 is off
    check_backend: bool = True  # compare gradients with the reference backend before step 1

    def asdict(self) -> dict[str, Any]:
        """Name -> value, as concepts, checkpoints and reports keep it."""
        return asdict(self)

    def encoder_rate(self) -> float:
        """The learning rate of what trains on the text encoders; the words' token embeddings have their own."""
        return self.learning_rate

    def check(self) -> None:
        """Refuse a wrong value with one sentence (ValueError)."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not fits(value, kind):
                raise ValueError(f"{name} must be {kind_text(kind)}, not {value!r}")
        for name in (n for n in COUNTS if getattr(self, n, None) is not None):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {getattr(self, name)!r}")
        for name, most in MOST.items():
            value = getattr(self, name, None)
            if value is not None and value > most:
                raise ValueError(f"{name} must be at most {most:,}, not {value:,}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must lie between 0 and 1, not {self.learning_rate!r}")
        for name in (n for n in AMOUNTS if getattr(self, n, None) is not None):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, not {getattr(self, name)!r}")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed must be an integer from 0 to {SEEDS - 1}, not {self.seed}")
        if self.init_word is not None and not self.init_word.strip():
            raise ValueError(f"init_word must be a word or None, not {self.init_word!r}")
        if self.resolution and self.resolution % 8:
            raise ValueError(f"resolution must be a multiple of 8, not {self.resolution}")
        given = (self.template,) if isinstance(self.template, str) else self.template
        for text in given or ("",):
            if "{subject}" not in text and "{token}" not in text:
                example = "as 'a photo of a {subject}' and 'a photo of {token}' do"
                raise ValueError(f"template must hold {{subject}} or {{token}}, {example}; it is {text!r}")
        if self.prior == "own" and self.prior_folder:
            raise ValueError("prior='own' uses no class images; leave out prior_folder, or give prior='drawn'")
        if self.prior == "own" and not self.prior_weight:
            raise ValueError("prior='own' does nothing at prior_weight 0. Fix: prior_weight=1, or leave out prior")
        if self.step_in_backward and self.optimizer != "adamw8bit":
            raise ValueError("step_in_backward needs optimizer='adamw8bit'")
        if self.states == "streamed" and self.optimizer != "adamw8bit":
            raise ValueError("states='streamed' needs optimizer='adamw8bit'")


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union; of any other type, itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def literal_choices(kind: Any) -> tuple[Any, ...]:
    """The values that a Literal type allows, None among them in a union with it; () for every other type."""
    found = tuple(choice for one in alternatives(kind) if get_origin(one) is Literal for choice in get_args(one))
    return (*found, None) if found and takes_none(kind) else found


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a setting's type; an integer is a number too, and True is neither."""
    return any(_is_of(value, one) for one in alternatives(kind))


def _is_of(value: Any, kind: Any) -> bool:
    """`fits` for one type that is not a union."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if get_origin(kind) is tuple:
        return isinstance(value, (tuple, list)) and all(fits(part, get_args(kind)[0]) for part in value)
    return isinstance(value, get_origin(kind) or kind)


def kind_text(kind: Any) -> str:
    """A setting's type in words: "an integer", "a number or none", "one of kv, crossattn"."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    said = []
    for one in alternatives(kind):
        if get_origin(one) is Literal:
            said.append(f"one of {', '.join(map(str, get_args(one)))}")
        else:
            said.append(names.get(one, "a list of texts" if get_origin(one) is tuple else "a table"))
    return " or ".join(said)


def takes_none(kind: Any) -> bool:
    """Whether a type is a union with None."""
    return type(None) in alternatives(kind)


def with_none_for_unset(settings: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with None where "" or 0 says "unset", as version 0.1.0 wrote it and people still pass it."""
    hints = get_type_hints(settings)
    unset = {name for name, value in values.items() if value in ("", 0) and takes_none(hints.get(name))}
    return {name: None if name in unset else value for name, value in values.items()}
