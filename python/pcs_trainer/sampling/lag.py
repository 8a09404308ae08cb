"""Localized attention-guided sampling (LAG) of Personalized Residuals (arXiv 2405.12978): a concept changes only the
positions that attend to its words.

In every transformer block, at every step, with C the places of the concept's words in the prompt:

    A = sum over c in C of the cross-attention's map of token c, averaged over the heads
    M = 1 where A > median(A), else 0
    f = (1 - M) * W x + M * (W + up down) x = W x + M * up (down x)

A and f are of the same block in the same forward, so the network is not evaluated once more, and nothing is resized.
Letters: P images of a call, B of a batch, G groups of tokens, N = h x w image positions, T text tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..unet.layers import Masks
from ..unet.unet import UNet
from .names import LAG_UNCOND

if TYPE_CHECKING:
    from ..concept.concept import Concept
    from .scene import Scene

# Projections of a transformer block that come after the attention over the text, so that its map can mask them.
AFTER_THE_MAP = ("attn2.to_out.0", "ff.net.0.proj", "ff.net.2")


@dataclass
class Lag:
    """Options of localized attention-guided sampling.

    Args:
        tokens: the words whose attention makes the mask, default: the concept's own word and its class word, and of
            several subjects a mask of each; with several concepts a dict from the concept's word to its list.
        uncond: the mask of the half without prompt: the same one ("reuse"), nothing ("zero"), everything ("one").
            The paper leaves it open; with "reuse", guidance does not amplify the residual itself.
        start, stop: fractions of the steps between which residuals are masked; outside they act everywhere.
        soft: masks between 0 and 1, the map scaled from its minimum to its maximum, in place of its cut at the median.
    """

    tokens: Sequence[str] | Mapping[str, Sequence[str]] | None = None
    uncond: str = "reuse"
    start: float = 0.0
    stop: float = 1.0
    soft: bool = False

    def __post_init__(self) -> None:
        if self.uncond not in LAG_UNCOND:
            raise ValueError(f"Lag(uncond={self.uncond!r}): choose one of {', '.join(LAG_UNCOND)}")
        if not 0 <= self.start < self.stop <= 1:
            given = f"start={self.start}, stop={self.stop}"
            raise ValueError(f"Lag({given}): they are fractions of the steps with 0 <= start < stop <= 1")

    def masks_at(self, step: int, steps: int) -> bool:
        """Whether step `step` (0, 1, ...) of `steps` is masked."""
        return self.start <= step / steps < self.stop

    def words_of(self, key: str) -> list[str] | None:
        """The words that were given for the concept `key`; None where it goes by its own."""
        given = self.tokens.get(key) if isinstance(self.tokens, Mapping) else self.tokens
        if given is None:
            return None
        return [word for word in dict.fromkeys([given] if isinstance(given, str) else given) if word]


def binary(maps: Tensor) -> Tensor:
    """1 where a map [..., N] is above its median; ties with the median are 0 (the paper leaves them open)."""
    return (maps > maps.median(dim=-1, keepdim=True).values).to(maps.dtype)  # [..., N]


def normalised(maps: Tensor) -> Tensor:
    """Each map [..., N] scaled so that its minimum is 0 and its maximum 1; a constant map is 0."""
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)  # [..., N]


class Masker:
    """Makes the masks of one batch inside the network's forward: `masks` of UNet.forward.

    Args:
        lag: the options.
        keys: the concept that each of the first groups of captured tokens belongs to; None is every residual. What
            several groups say of one concept is joined: it acts where any of them does.
        guided: the batch is the images without prompt, then the same with it.
    """

    def __init__(self, lag: Lag, keys: Sequence[str | None], guided: bool) -> None:
        self.lag, self.keys, self.guided = lag, list(keys), guided

    def __call__(self, _block: str, maps: Tensor | None) -> Masks:
        if maps is None:
            return None
        maps = maps[:, : len(self.keys)]  # [B or 2 B, G, N]
        maps = maps[len(maps) // 2 :] if self.guided else maps  # [B, G, N]
        made = normalised(maps) if self.lag.soft else binary(maps)
        if self.guided:
            reuse = self.lag.uncond == "reuse"
            made = torch.cat([made if reuse else torch.full_like(made, float(self.lag.uncond == "one")), made])
        joined: dict[str | None, Tensor] = {}
        for g, key in enumerate(self.keys):
            joined[key] = torch.maximum(joined[key], made[:, g]) if key in joined else made[:, g]
        if None in joined:
            return joined[None]
        return {key: mask for key, mask in joined.items() if key is not None}


def mask_block(unet: UNet, module: str) -> str | None:
    """The transformer block whose map masks a projection, or None where no map comes before it."""
    transformer, _, leaf = module.rpartition(".")
    if leaf == "proj_out":
        inside = [name for name in unet.attention_names() if name.startswith(f"{transformer}.transformer_blocks.")]
        return inside[-1] if inside else None
    block = next((module.removesuffix(f".{end}") for end in AFTER_THE_MAP if module.endswith(f".{end}")), None)
    return block if block in unet.attention_names() else None


def masked_blocks(unet: UNet, keys: Sequence[str | None]) -> list[str]:
    """The blocks whose maps LAG needs, in the order in which they run.

    Args:
        unet: with the concepts' residuals attached.
        keys: the concepts to mask; None is every residual.

    Raises:
        ValueError: a concept has no residual that a map can mask. Where only some are such, a warning names them.
    """
    needed: set[str] = set()
    for key in keys:
        blocks, left = set(), []
        for name, module in unet.named_modules():
            if any(key is None or r.key == key for r in getattr(module, "residuals", ())):
                block = mask_block(unet, name)
                if block is None:
                    left.append(name)
                else:
                    blocks.add(block)
        who = "the model" if key is None else f"the concept {key!r}"
        if not blocks:
            raise ValueError(
                f"LAG masks low-rank residuals that follow a block's attention over the text (proj_out, attn2.to_out, "
                f"ff), and {who} has none: sample without LAG"
            )
        if left:
            what = f"{left[0]}{f' and {len(left) - 1} more' if len(left) > 1 else ''}"
            warnings.warn(
                f"LAG leaves {what} of {who} unmasked: computed before the block's map is known", stacklevel=3
            )
        needed |= blocks
    return [name for name in unet.attention_names() if name in needed]


@dataclass
class Attention:
    """The attention captured while images are drawn: for LAG's masks, for maps to return, for both or for neither."""

    weights: Tensor | None = None  # [P, G, T]: 1 at the places of each group's words
    blocks: list[str] | None = None  # where maps are needed; None: everywhere
    lag: Lag | None = None
    keys: list[str | None] = field(default_factory=list)  # the concept of each of the first groups
    tokens: list[str] = field(default_factory=list)  # the words of the other groups

    def of(self, pictures: Sequence[int], guided: bool) -> Tensor | dict[str, Tensor] | None:
        """The token weights of a batch, for all blocks or by block."""
        if self.weights is None:
            return None
        own = self.weights[list(pictures)]  # [B, G, T]
        capture = torch.cat([torch.zeros_like(own), own]) if guided else own  # [B or 2 B, G, T]
        return capture if self.blocks is None else dict.fromkeys(self.blocks, capture)


def attention_of(scene: Scene, lag: Lag | None, maps: bool | Sequence[str]) -> Attention:
    """What to capture for a scene whose concepts are on the model.

    Args:
        scene: the prompts and concepts.
        lag: LAG's options, or None without it.
        maps: True for maps of the concepts' words, or words.
    """
    groups: list[list[list[str]]] = []  # for each group, each picture's words
    keys: list[str | None] = []
    pictures = range(len(scene.prompts))
    if lag is not None:
        known = [c.key for c in scene.concepts]
        unknown = [key for key in lag.tokens if key not in known] if isinstance(lag.tokens, Mapping) else []
        if unknown:
            raise ValueError(
                f"Lag(tokens=...) names {unknown[0]!r}; the concepts here are {', '.join(map(repr, known))}"
            )
        if scene.index is None and scene.concepts:
            for concept in scene.concepts:
                own = _by_group([_subjects_in(lag, scene, concept, i) for i in pictures])
                keys, groups = [*keys, *[concept.key] * len(own)], [*groups, *own]
        else:
            groups = _by_group([_subjects_of_all(lag, scene, i) for i in pictures])
            keys = [None] * len(groups)
        _check_named(scene, keys, groups)
    tokens = _asked(scene, maps)
    groups += [[[token]] * len(pictures) for token in tokens]
    if not groups:
        return Attention()
    weights = torch.zeros(len(pictures), len(groups), scene.model.tokenizer.model_max_length)  # [P, G, T]
    for g, words in enumerate(groups):
        for i in pictures:
            weights[i, g, [j for word in words[i] for j in scene.places(i, word)]] = 1
    blocks = masked_blocks(scene.model.unet, list(dict.fromkeys(keys))) if keys else None
    weights = weights.to(scene.model.unet.conv_in.weight.device)
    return Attention(weights, None if tokens else blocks, lag, keys, tokens)


def _names(concept: Concept) -> list[str]:
    """The words of the concept's subjects: of each its own and its class word."""
    return list(dict.fromkeys(word for subject in concept.subjects for word in subject if word))


def _subjects_in(lag: Lag, scene: Scene, concept: Concept, i: int) -> list[list[str]]:
    """The words of each of the concept's subjects that prompt i names, or those that `lag` gives.

    Of several subjects, one that is not named by its own word is not meant by its class word either: two dogs were
    learned together, and the prompt has one of them.
    """
    given = lag.words_of(concept.key)
    if given is not None:
        return [given]
    subjects = [[word for word in dict.fromkeys(subject) if word] for subject in concept.subjects]
    named = [words for (token, _), words in zip(concept.subjects, subjects, strict=True) if scene.places(i, token)]
    return named or subjects


def _subjects_of_all(lag: Lag, scene: Scene, i: int) -> list[list[str]]:
    """The words of each subject of image i's concepts, where one mask is for every residual."""
    own = scene.own(i)
    if own:
        return [words for concept in own for words in _subjects_in(lag, scene, concept, i)]
    given = lag.words_of("")
    return [list(scene.words) if given is None else given] if scene.index is None else []


def _by_group(pictures: list[list[list[str]]]) -> list[list[list[str]]]:
    """Each picture's lists of words as groups, of which each has one list a picture; at least one group."""
    count = max([1, *map(len, pictures)])
    return [[words[g] if g < len(words) else [] for words in pictures] for g in range(count)]


def _check_named(scene: Scene, keys: Sequence[str | None], groups: list[list[list[str]]]) -> None:
    """Raise where no prompt has a word that masks a concept, or one prompt has none of any concept."""

    def found(i: int, key: str | None) -> bool:
        own = [words[i] for k, words in zip(keys, groups, strict=True) if k == key]
        return any(scene.places(i, word) for words in own for word in words)

    def said(key: str | None) -> str:
        words = [w for k, own in zip(keys, groups, strict=True) if k == key for of_picture in own for w in of_picture]
        return ", ".join(dict.fromkeys(map(repr, words))) or "nothing: give Lag(tokens=[...])"

    pictures = [i for i in range(len(scene.prompts)) if scene.own(i) or scene.index is None]
    for key in dict.fromkeys(keys):
        if not any(found(i, key) for i in pictures):
            who = "the subject" if key is None else f"the concept {key!r}"
            raise ValueError(f"LAG looks for the words of {who} ({said(key)}), and no prompt has one of them")
    for i in pictures:
        if not any(found(i, key) for key in keys):
            words = ", ".join(said(key) for key in dict.fromkeys(keys))
            raise ValueError(
                f"LAG looks for the words of a subject ({words}), and the prompt {scene.prompts[i]!r} has none of them "
                "and would be the base model's; name one in it, or sample it without LAG"
            )


def _asked(scene: Scene, maps: bool | Sequence[str]) -> list[str]:
    """The words to return maps of: the given ones, or the learned words and class words that a prompt has."""
    if maps is False:
        return []
    names = [*scene.words, *(name for c in scene.concepts for name in _names(c))]
    wanted = names if maps is True else list(maps)
    said = [w for w in dict.fromkeys(wanted) if any(scene.places(i, w) for i in range(len(scene.prompts)))]
    if maps is not True and len(said) < len(wanted):
        raise ValueError(f"return_maps: no prompt has the word {next(w for w in wanted if w not in said)!r}")
    if not said:
        raise ValueError(
            "return_maps=True shows the concepts' words, and no prompt has one: return_maps=['a word', ...]"
        )
    return said
