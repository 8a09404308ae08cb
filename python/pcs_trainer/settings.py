"""Everything that decides a training run, and the presets of the methods (their papers' values)."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model.model import Model

IDENTIFIERS = ("rare", "learned", "plain")
SCHEDULES = ("constant", "cosine", "linear")


@dataclass
class Settings:
    """One run. Where a method does not use a value, it has no effect."""

    method: str = "personalized_residuals"
    class_word: str = ""
    token: str = ""  # what names the subject; "" lets the identifier choose
    identifier: str = "learned"  # rare: a word of the tokenizer; learned: new rows; plain: the user's own words
    train_token: bool = False  # whether the learned word's rows train
    token_vectors: int = 1  # rows of a learned word that starts from a rare one
    init_word: str = ""  # what a learned word starts from; "" is a rare word
    template: str = "a photo of a {subject}"
    class_template: str = "a photo of a {class}"
    resolution: int = 0  # pixels a side; 0 is the model's own
    steps: int = 150
    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-3
    token_learning_rate: float = 0.0  # 0 is learning_rate
    lr_schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 1e-2
    clip_norm: float = 1.0  # of all gradients together; 0 is off
    clip: str = "previous"  # with the step in the backward: previous or two_pass
    snr_gamma: float = 0.0  # min-SNR weight; 0 is off
    timesteps: str = "uniform"  # or snr: p(t) grows with the noise
    rank: int = 0  # of low-rank updates; 0 is the method's own
    init: str = "zero_up"  # or both_random
    variant: str = ""  # custom_diffusion: kv, crossattn; textboost: v1, qkv, causal, causal++
    train_text_encoder: bool = False
    prior_weight: float = 0.0  # of the loss on pictures of the class; 0 is off
    prior_images: int = 100
    prior_folder: str = ""  # real pictures of the class, with captions beside them; "" lets the model draw them
    prior_steps: int = 25
    augment: bool = False
    bank: int = 256  # augmented pictures prepared before training; the autoencoder leaves memory after that
    augment_probability: float = 0.8
    preservation_weight: float = 0.0  # textboost: of the knowledge-preservation loss
    optimizer: str = "adamw8bit"  # or adamw
    step_in_backward: bool = False
    stage: str = "base"  # dreambooth: or super_resolution
    noise_level: float = 1e-5  # super_resolution: of the noise laid on the small picture
    seed: int = 0
    plan: str | dict[str, str] = "A"  # memory plan of the UNet, or of its layers by leading part of their names
    checkpoint_every: int = 0  # 0: at the end of the run alone
    keep: int = 2
    preview_every: int = 0
    preview_prompts: tuple[str, ...] = ()
    probe_every: int = 50  # steps between looks at the held-out loss and the class's drift; 0 is off
    check_backend: bool = True  # compare gradients with the reference before step 1

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


# What the papers say, by method; a value not named here is Settings' own.
PRESETS: dict[str, dict[str, Any]] = {
    "dreambooth": dict(
        identifier="rare", template="a {subject}", class_template="a {class}", steps=800, batch=1, learning_rate=5e-6,
        prior_weight=1.0, prior_images=100, step_in_backward=True,
    ),
    "dreambooth_lora": dict(
        identifier="rare", template="a {subject}", class_template="a {class}", steps=500, batch=1, learning_rate=1e-4,
        rank=4, prior_weight=1.0, prior_images=100,
    ),
    "custom_diffusion": dict(
        identifier="learned", train_token=True, template="photo of a {subject}", class_template="photo of a {class}",
        steps=250, batch=8, learning_rate=8e-5, prior_weight=1.0, prior_images=200, augment=True, variant="kv",
    ),
    "personalized_residuals": dict(identifier="learned", steps=150, batch=4, learning_rate=1e-3),
    "textboost": dict(
        identifier="learned", train_token=True, init_word="{class}", steps=250, batch=8, learning_rate=1e-4,
        token_learning_rate=1e-3, rank=4, augment=True, preservation_weight=0.1, timesteps="snr", variant="v1",
    ),
    "textual_inversion": dict(
        identifier="learned", train_token=True, init_word="{class}", steps=1000, batch=4, learning_rate=5e-3,
        weight_decay=0.0,
    ),
}  # fmt: skip

# The embedded model is a thousandth of a real one: it takes larger steps, and fewer pictures of the class. It cannot
# draw the collages and grey margins that augmentation makes of 64 pixels, and learns less with them. Its text encoder
# of three layers is too small to hold a subject by itself: TextBoost's second version, which also moves the text
# states in front of each cross-attention, can.
EMBEDDED: dict[str, dict[str, Any]] = {
    "dreambooth": dict(steps=350, batch=2, learning_rate=3e-4, prior_images=32),
    "dreambooth_lora": dict(steps=450, batch=2, learning_rate=1.5e-3, rank=8, prior_images=32),
    "custom_diffusion": dict(
        steps=700, batch=2, learning_rate=2e-3, token_learning_rate=2e-2, prior_images=32, augment=False
    ),
    "personalized_residuals": dict(steps=500, batch=4, learning_rate=8e-3, rank=8),
    "textboost": dict(
        steps=800, batch=4, learning_rate=2e-3, token_learning_rate=2e-2, augment=False, variant="causal++"
    ),
    "textual_inversion": dict(steps=300, batch=8, learning_rate=2e-2),
}

# Custom Diffusion's advice for faces.
FACES = dict(variant="crossattn", learning_rate=5e-6, steps=750, augment=False)


def settings_for(model: Model | None, method: str, **overrides: Any) -> Settings:
    """The method's preset for this model, with what the user chose on top; a wrong name or value is one sentence."""
    if method not in PRESETS:
        near = difflib.get_close_matches(method, PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the methods are {', '.join(PRESETS)}"
        raise ValueError(f"there is no method {method!r}; {hint}")
    known = {f.name: f for f in fields(Settings)}
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no setting {name!r}{hint}")
    chosen = PRESETS[method] | (EMBEDDED[method] if model is not None and model.embedded else {})
    settings = Settings(method=method, **(chosen | overrides))
    _check(settings)
    return settings


def _check(s: Settings) -> None:
    def one_of(name: str, options: tuple[str, ...]) -> None:
        if getattr(s, name) not in options:
            raise ValueError(f"{name} must be one of {', '.join(options)}, not {getattr(s, name)!r}")

    one_of("identifier", IDENTIFIERS)
    one_of("lr_schedule", SCHEDULES)
    one_of("clip", ("previous", "two_pass"))
    one_of("timesteps", ("uniform", "snr"))
    one_of("init", ("zero_up", "both_random"))
    one_of("optimizer", ("adamw8bit", "adamw"))
    one_of("stage", ("base", "super_resolution"))
    for name in ("steps", "batch", "accumulate", "keep", "token_vectors", "bank", "prior_images"):
        if not isinstance(getattr(s, name), int) or getattr(s, name) < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {getattr(s, name)!r}")
    if not 0 < s.learning_rate < 1:
        raise ValueError(f"learning_rate must lie between 0 and 1, not {s.learning_rate!r}")
    for name in ("token_learning_rate", "clip_norm", "snr_gamma", "prior_weight", "preservation_weight", "weight_decay",
                 "warmup", "rank", "checkpoint_every", "preview_every", "probe_every", "resolution"):  # fmt: skip
        if not getattr(s, name) >= 0:
            raise ValueError(f"{name} must not be negative, and is {getattr(s, name)!r}")
    if s.resolution % 8:
        raise ValueError(f"resolution must be a multiple of 8, not {s.resolution}")
    if "{subject}" not in s.template:
        raise ValueError(f"template must hold {{subject}}, as 'a photo of a {{subject}}' does; it is {s.template!r}")
    if s.step_in_backward and s.optimizer != "adamw8bit":
        raise ValueError("the step in the backward works with optimizer='adamw8bit' alone")
