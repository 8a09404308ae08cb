"""TextBoost (arXiv 2409.08248): one picture, learned by the text encoder alone.

Trains   rank-4 LoRA (alpha = rank) on the text encoder's q, k, v, out, fc1, fc2; V*, which starts from the class word;
         and 12 embeddings of words that name what was done to the picture ("<aug-crop> a photo of V*"), so that it is
         not learned as part of V*. UNet and autoencoder are frozen.
Loss     noise MSE at timesteps p(t) ~ max log SNR - log SNR(t)
         + 0.1 mean(1 - cos(h_tuned, h_frozen)) over all positions of general captions (knowledge preservation).
         What is held counts as held there too: the first token and empty captions add nothing to the mean.
Held     the first token and the empty prompt stay as the frozen encoder's; trained token embeddings are no longer than
         the table's mean.
Default  250 steps, batch 8, LoRA 1e-4, token embeddings 1e-3.

variant="causal" is the second version: a rank-1 residual on fc2 for the tokens from V* on, so that what stands before
V* is untouched; "causal++" adds one on the text states of each cross-attention. 100 and 80 steps; captions without V*
are as they were whatever trains, so knowledge preservation, whose gradient is 0 there, is not computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..concept import grammar
from ..concept.captions import general_captions
from ..data import augment
from ..data.augment import Augmentation, Augmented, Shown
from ..data.prompts import class_prompt
from ..model.model import Model
from ..model.text import Reading, encode, read
from ..model.text_adapters import layers_read, mean_row_norm, text_module, without_adapters
from ..settings import Settings
from .learner import Learner, Pair, fresh_pair
from .method import Method, SideLoss
from .templates import PHOTOS

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LAYERS = {  # by variant: the layers of each transformer block that get a residual
    "v1": (*QKV, "self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
    "qkv": QKV,
    "causal": ("mlp.fc2",),
    "causal++": ("mlp.fc2",),
}
CAUSAL_RANK = 1
STEPS = {"causal": 100, "causal++": 80}  # the second version's schedules; the first's is below
CAPTIONS = 200  # general captions that the preservation loss draws from


@dataclass(kw_only=True)
class TextBoost(Settings):
    """The paper's values."""

    train_token: bool = True
    # As in its code's example. Its experiments put an attribute before the class, chosen by hand for each subject, with
    # a row for each piece: init_word="corgi dog" does that.
    init_word: str | None = "{class}"
    # The paper's figures say "photo of V*"; its code's experiments draw from CLIP's ImageNet prompts, V* alone in them.
    template: str | tuple[str, ...] = PHOTOS
    steps: int = 250
    batch: int = 8
    learning_rate: float = 1e-4
    token_learning_rate: float | None = 1e-3
    timesteps: Literal["uniform", "snr"] = "snr"
    rank: int = 4
    init: Literal["zero_up", "both_random"] = "zero_up"  # both_random: the second half is small, not zero
    variant: Literal["v1", "qkv", "causal", "causal++"] = "v1"  # v1, its q, k, v alone, or the second version
    augment: bool = True  # photos are changed, and new words name the change
    augment_probability: float = 0.5  # of each kind of change (the paper: 0.5 to 0.8; its released experiments: 0.5)
    bank: int = 256  # augmented pictures prepared before training; the autoencoder leaves memory after that
    preservation_weight: float = 0.1  # of the knowledge-preservation loss; 0 is off

    @property
    def causal(self) -> bool:
        """Whether residuals act on the tokens from V* on alone."""
        return self.variant.startswith("causal")

    def check(self) -> None:
        """As of every method; the subject's word is none of the augmentations' own, and every loss has a gradient."""
        super().check()
        if self.causal and self.prior_weight:
            raise ValueError(
                f"the prior loss has no gradient in textboost's variant {self.variant!r}, which leaves prompts without "
                "its word as they are. Fix: prior_weight=0 without prior, or variant='v1'"
            )
        if self.augment and self.token in {augment.word(name) for name in augment.WORDS}:
            raise ValueError(f"token {self.token!r} is TextBoost's word for an augmentation; choose another")


def setup(model: Model, s: TextBoost, learner: Learner) -> None:
    """Residuals on the text encoders, the subject's word, and the words for augmentations."""
    learner.hold_first = True
    encoder_residuals(model, s, learner)
    if s.variant == "causal++":
        context_residuals(model, s, learner)
    learner.add_subject_word(s)
    if s.augment:
        for name, (text, count) in augment.WORDS.items():
            rows = learner.vocabulary.rows(text, count)
            learner.add_word(augment.word(name), rows, trained=s.train_token, kept=False)


def encoder_residuals(model: Model, s: TextBoost, learner: Learner) -> None:
    """A pair on each of the variant's layers; the causal ones reach the tokens from V* on."""
    for part, encoder in zip(grammar.TEXT_PARTS, model.text_encoders, strict=False):
        for number in range(layers_read(model.text_encoders, encoder)):
            for layer in LAYERS[s.variant]:
                name = f"text_model.encoder.layers.{number}.{layer}"
                rank = CAUSAL_RANK if s.causal else s.rank
                pair = fresh_pair(text_module(encoder, name), rank, s.init, learner.generator, spread=1 / rank)
                if s.causal:
                    learner.attach_from_word_on(part, name, pair, s.token)
                else:
                    learner.attach(part, name, pair)


def context_residuals(model: Model, s: TextBoost, learner: Learner) -> None:
    """A rank-1 pair on the text states in front of each cross-attention's keys and values."""
    generator = torch.Generator().manual_seed(s.seed + 1)  # apart from the encoder's pairs: both variants start alike
    width = model.unet.settings["cross_attention_dim"]
    device = model.unet.conv_in.weight.device
    for block in model.unet.attention_names():
        down = nn.Parameter(torch.randn(1, width, generator=generator).to(device))
        learner.attach_context(block, Pair(down, nn.Parameter(torch.zeros(width, 1, device=device))), s.token)


def augmentation(s: TextBoost) -> Augmentation | None:
    """One change a picture, named in front of its prompt."""

    def change(picture: Shown, size: int, _latent: int, generator: torch.Generator) -> Augmented:
        return augment.textboost(picture, size, s.augment_probability, generator)

    return Augmentation(change, s.bank) if s.augment else None


def preserved_captions(model: Model, subjects: Sequence[TextBoost], count: int = CAPTIONS) -> list[str]:
    """General captions: one in ten empty, one in ten a class prompt, the subjects' in turn."""
    classes = list(dict.fromkeys(class_prompt(s) for s in subjects))
    captions = general_captions(model, count)
    said = enumerate(captions)
    return ["" if i % 10 == 0 else classes[i // 10 % len(classes)] if i % 10 == 1 else text for i, text in said]


def preserves(s: TextBoost) -> bool:
    """Whether the knowledge-preservation loss has a gradient: causal residuals leave captions without V* alone."""
    return bool(s.preservation_weight) and not s.causal


def preservation(model: Model, subjects: Sequence[TextBoost]) -> SideLoss | None:
    """The weighted knowledge-preservation loss on some of the general captions."""
    s = subjects[0]
    if not preserves(s):
        return None
    captions = preserved_captions(model, subjects)

    def draw(generator: torch.Generator) -> Reading:
        return read(
            model, [captions[i] for i in torch.randint(len(captions), (s.batch,), generator=generator).tolist()]
        )

    def loss(said: Reading) -> Tensor:
        tuned = encode(model, said, hold_first=True).states
        assert isinstance(tuned, Tensor)  # only causal residuals give single blocks states of their own
        with torch.no_grad():
            frozen = frozen_states(model, said)
        return s.preservation_weight * preservation_loss(tuned, frozen)

    return SideLoss(draw, loss)


def preservation_loss(tuned: Tensor, frozen: Tensor) -> Tensor:
    """Mean over prompts and all T positions of 1 - cos between tuned and frozen text states [B, T, C]."""
    return (1 - F.cosine_similarity(tuned.float(), frozen.float(), dim=-1)).mean()


def frozen_states(model: Model, said: Sequence[str] | Reading) -> Tensor:
    """The text states [B, T, C] of the encoders without what is learned."""
    with ExitStack() as stack:
        for encoder in model.text_encoders:
            stack.enter_context(without_adapters(encoder))
        states = encode(model, said).states
    assert isinstance(states, Tensor)  # nothing is attached to single blocks while the adapters are off
    return states


@torch.no_grad()
def limit_norms(model: Model, words: Mapping[str, Sequence[Tensor]]) -> None:
    """Token embeddings no longer than the mean of the encoder's own table."""
    for e, encoder in enumerate(model.text_encoders):
        limit = mean_row_norm(encoder)
        for rows in words.values():
            norm = rows[e].norm(dim=1, keepdim=True).clamp_min(1e-12)  # [n, 1]; a zero row stays zero
            rows[e].mul_((limit / norm).clamp_max(1.0))


def several_subjects(s: TextBoost) -> str | None:
    """Why several subjects cannot be learned together."""
    if not s.causal:
        return None
    return (
        f"textboost's variant {s.variant!r} is made for one word; learn several subjects with variant='v1', or with "
        "custom_diffusion"
    )


def schedule(given: Mapping[str, Any]) -> dict[str, Any]:
    """The steps of the second version, where its variants are chosen."""
    variant = str(given.get("variant"))
    return {"steps": STEPS[variant]} if variant in STEPS else {}


METHOD = Method(
    settings=TextBoost,
    setup=setup,
    paper="https://arxiv.org/abs/2409.08248",
    trains="low-rank residuals on the text encoder, and new words",
    choose="a single photo",
    # The embedded text encoder of three layers is too small to hold a subject by itself: the second version, which also
    # moves the text states in front of each cross-attention, can. 64 pixels cannot draw augmentation's collages.
    tiny={
        "steps": 800,
        "batch": 4,
        "learning_rate": 2e-3,
        "token_learning_rate": 2e-2,
        "augment": False,
        "variant": "causal++",
        "template": "a photo of a {subject}",  # with which the others were chosen
    },
    augment=augmentation,
    side_loss=preservation,
    reads_more_text=preserves,
    implied=schedule,
    after_step=lambda model, learner: limit_norms(model, learner.rows),
    one_subject=several_subjects,
)
