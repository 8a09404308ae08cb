"""What a step trains on: the pictures prepared once, and each step's examples drawn from (seed, step) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.autoencoder import Moments, latent_factor
from ..model.upscaler import reduced, with_noise
from .augment import LONGEST_PREFIX, Augmentation, Shown, training_mask, varied
from .latents import cached_moments
from .pictures import Loaded, Picture, fitted
from .prior import Count, prior_pictures
from .prompts import check_length, class_prompt, subject_prompts, word_size
from .views import views

if TYPE_CHECKING:
    from ..model.model import Model
    from ..settings import Settings


@dataclass
class Subject:
    """One thing to learn: its pictures, and the settings with its own class word and token."""

    loaded: Loaded
    settings: Settings

    @property
    def pictures(self) -> list[Picture]:
        return self.loaded.pictures


@dataclass
class Bank:
    """Prepared pictures: moments [n], masks [n, 1, h, w] or None, and prompts.

    `others` are further prompts of each picture, one of all of which is drawn in each step; `owners` says whose each
    picture is.
    `small` [n, 3, h, w] are the pictures as an up-scaler reads them, where one is trained.
    `given` are the digests of the user's own class images; what the model drew has none.
    """

    moments: Moments
    prompts: list[str]
    masks: Tensor | None = None
    owners: Tensor | None = None
    others: list[tuple[str, ...]] | None = None
    small: Tensor | None = None
    given: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def every_prompt(self) -> list[str]:
        """The prompts of all pictures."""
        return [*self.prompts, *(prompt for own in self.others or () for prompt in own)]

    def prompts_of(self, pick: Sequence[int], generator: torch.Generator) -> list[str]:
        """A prompt for each picture."""
        if self.others is None:
            return [self.prompts[i] for i in pick]
        choices = [(self.prompts[i], *self.others[i]) for i in pick]
        return [own[int(torch.randint(len(own), (), generator=generator))] for own in choices]


@dataclass
class Batch:
    """A step's examples before noise: latents [B], prompts, masks; the first `subjects` of them are of the subject.

    The others hold on to the class: class images, or the subject's own examples again under the class prompt.
    """

    latents: Tensor
    prompts: list[str]
    masks: Tensor | None
    noise: Tensor
    t: Tensor
    subjects: int
    names: list[str] = field(default_factory=list)
    small: Tensor | None = None  # [B, 3, h, w], what an up-scaler reads, its noise included

    def smallest(self, side: int) -> Batch:
        """One picture of the subject and, where something holds on to the class, one example of that, cut to a square.

        Args:
            side: latents a side, at most; the square is where the mask covers the most.
        """
        keep = [0, self.subjects] if len(self.t) > self.subjects else [0]
        masks = None if self.masks is None else self.masks[keep]
        top, left = (0, 0) if masks is None else _fullest(masks[:1], side)

        def cut(x: Tensor) -> Tensor:
            return x[..., top : top + side, left : left + side].contiguous()

        prompts, names = ([all_of[i] for i in keep] if all_of else [] for all_of in (self.prompts, self.names))
        masks = None if masks is None else cut(masks)
        small = None if self.small is None else cut(self.small[keep])
        return Batch(cut(self.latents[keep]), prompts, masks, cut(self.noise[keep]), self.t[keep], 1, names, small)


def _fullest(mask: Tensor, side: int) -> tuple[int, int]:
    """The corner (top, left) of the square of a mask [1, 1, h, w] that holds the most of it."""
    sums = F.avg_pool2d(mask.float(), (min(side, mask.shape[2]), min(side, mask.shape[3])), stride=1)[0, 0]
    return divmod(int(sums.argmax()), sums.shape[1])


class Stream(IntEnum):
    """Which random numbers of a run: each use draws from a stream of its own, so that none moves another."""

    AUGMENT = 1
    BATCH = 2
    SIDE_LOSS = 3
    EXTRA_INPUT = 4
    PROBE = 5
    PROMPT = 6
    VIEWS = 7


def seeded(*parts: int) -> torch.Generator:
    """A generator that depends on nothing but these numbers."""
    digest = hashlib.sha256(repr(tuple(int(part) for part in parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))  # 56 bits: a seed is below 2^63


def subject_bank(
    model: Model,
    subjects: Sequence[Subject],
    size: int,
    augmentation: Augmentation | None = None,
    upscaler: bool = False,
) -> tuple[Bank, list[str]]:
    """The subjects' pictures at size x size as latents, and their names.

    Args:
        model: its autoencoder encodes them.
        subjects: what is learned; the first one's seed decides what augmentation does.
        size: pixels a side.
        augmentation: how many varied pictures to prepare, and how; None takes the photos as they are.
        upscaler: prepare the small pictures that an up-scaler reads, too.
    """
    seed = subjects[0].settings.seed
    latent = size // latent_factor(model)
    change = augmentation.change if augmentation else None
    pixels, prompts, masks, owners, names = [], [], [], [], []
    count = augmentation.count if augmentation else 0  # not fewer for a short run: a resumed one draws from the same
    for owner, subject in enumerate(subjects):
        pictures = views(subject.pictures, subject.settings, seeded(seed, Stream.VIEWS, owner))
        for i in range(max(count // len(subjects), len(pictures))):
            picture = pictures[i % len(pictures)]
            try:
                generator = seeded(seed, Stream.AUGMENT, owner, i)
                shown = varied(Shown(picture.pixels, picture.mask), size, latent, change, generator)
            except ValueError as error:
                raise ValueError(f"{picture.name}: {error}") from None
            pixels.append(shown.pixels)
            said = subject_prompts(subject.settings, picture.caption)
            prompts.append(tuple(shown.prefix + prompt for prompt in said))
            masks.append(training_mask(shown, latent))
            owners.append(owner)
            names.append(picture.name)
    stacked = torch.stack(masks)
    first, others = [own[0] for own in prompts], [own[1:] for own in prompts]
    counted = None if bool((stacked == 1).all()) else stacked
    bank = Bank(cached_moments(model, pixels), first, counted, torch.tensor(owners), others if any(others) else None)
    bank.small = _small(model, pixels) if upscaler else None
    return bank, names


def length_notes(model: Model, subjects: Sequence[Subject], augmented: bool) -> list[str]:
    """A sentence for each caption that the text encoder does not read to its end.

    Args:
        model: its first tokenizer counts.
        subjects: whose pictures and prompts.
        augmented: words for augmentations may stand in front.

    Raises:
        ValueError: a prompt loses the subject's word.
    """
    tokenizer = model.tokenizers[0]
    sizes = {s.token: word_size(tokenizer, s) for s in (x.settings for x in subjects) if s.identifier == "learned"}
    prefix, sizes = ("<augmented>", sizes | {"<augmented>": LONGEST_PREFIX}) if augmented else ("", sizes)
    notes: dict[str, None] = {}  # each once
    for subject in subjects:
        s = subject.settings
        for picture in subject.pictures:
            for prompt in subject_prompts(s, picture.caption):
                notes[check_length(tokenizer, prefix + prompt, picture.name, sizes, s.token or s.class_word)] = None
    return [note for note in notes if note]


def prior_bank(
    model: Model,
    subjects: Sequence[Subject],
    s: Settings,
    size: int,
    report: Callable[[str], Any],
    count: Count | None = None,
    upscaler: bool = False,
) -> Bank | None:
    """Class images with their captions, or None where there is no such loss.

    Args:
        model: samples them where no folder is given, and encodes them.
        subjects: whose classes.
        s: how many, from where, with how many sampling steps.
        size: pixels a side.
        report: told what is being sampled and what was skipped.
        count: called as count(done, total) with each sampling step.
        upscaler: prepare the small pictures that an up-scaler reads, too.
    """
    if not s.prior_weight or s.prior == "own":
        return None
    pixels: list[np.ndarray] = []
    prompts: list[str] = []
    given: list[str] = []
    sets = {(own.prior_folder, class_prompt(own)): own for own in (subject.settings for subject in subjects)}
    folders = {folder for folder, _ in sets}
    shared = len(sets) > 1 and len(folders) == 1 and s.prior_folder  # one folder for subjects of several classes
    share = -(-s.prior_images // len(sets))  # rounded up: no class has fewer images than were asked for
    for (folder, prompt), own in list(sets.items())[: 1 if shared else None]:
        pictures = prior_pictures(model, prompt, replace(own, prior_images=share, resolution=size), report, count)
        bare = [p.name for p in pictures if not p.caption] if shared else []
        if bare:
            raise ValueError(
                f"{bare[0]} in {folder} has no caption, and the subjects are of several classes; put a .txt with what "
                "it shows beside each, give each subject a folder of its own, or none: the model draws each class"
            )
        given += [p.digest for p in pictures] if folder else []
        pictures = views(pictures, own, seeded(s.seed, Stream.VIEWS, len(prompts)))
        pixels += [fitted(p.pixels, size) for p in pictures]
        prompts += [p.caption or prompt for p in pictures]
    small = _small(model, pixels) if upscaler else None
    return Bank(cached_moments(model, pixels), prompts, small=small, given=given)


def _small(model: Model, pixels: Sequence[np.ndarray]) -> Tensor:
    """Pictures as an up-scaler reads them [n, 3, h, w]."""
    return torch.stack([reduced(p, latent_factor(model)) for p in pixels])


def draw_batch(
    subject: Bank,
    prior: Bank | None,
    names: list[str],
    s: Settings,
    step: int,
    micro: int,
    share: tuple[int, int],
    timesteps: Callable[[int, torch.Generator], Tensor],
    own: Sequence[str] = (),
    small_noise: float | None = None,
) -> Batch:
    """The examples of one micro-batch: a function of the seed, the step and the micro-batch alone.

    Args:
        subject: the subjects' pictures.
        prior: the class images, of which as many come as of the subject.
        names: of the subject's pictures.
        s: seed and batch.
        step, micro: which examples.
        share: (rank, world): of several processes each takes its part of world x batch examples.
        timesteps: random timesteps, by their number and a generator.
        own: each subject's class prompt, where the subjects' own noisy latents come a second time under it.
        small_noise: variance of the noise on the small pictures that an up-scaler reads; None where there are none.
    """
    rank, world = share
    generator = seeded(s.seed, Stream.BATCH, step, micro)
    count = s.batch * world
    pick = torch.randint(len(subject), (count,), generator=generator)
    x = subject.moments.draw(pick, generator)
    small = None if subject.small is None else subject.small[pick]
    prompts = subject.prompts_of(pick.tolist(), seeded(s.seed, Stream.PROMPT, step, micro))
    masks = None if subject.masks is None else subject.masks[pick]
    said = [names[i] for i in pick.tolist()]
    keep = torch.arange(rank * s.batch, (rank + 1) * s.batch)
    if prior is not None:
        more = torch.randint(len(prior), (count,), generator=generator)
        x = torch.cat([x, prior.moments.draw(more, generator)])
        small = None if small is None or prior.small is None else torch.cat([small, prior.small[more]])
        prompts += [prior.prompts[i] for i in more.tolist()]
        said += ["a picture of the class"] * count
        masks = None if masks is None else torch.cat([masks, torch.ones(count, *masks.shape[1:])])
        keep = torch.cat([keep, count + keep])
    noise = torch.randn(x.shape, generator=generator)
    t = timesteps(len(x), generator)
    if own:
        x, noise, t, said = torch.cat([x, x]), torch.cat([noise, noise]), torch.cat([t, t]), said * 2
        owners = [0] * count if subject.owners is None else subject.owners[pick].tolist()
        prompts += [own[owner] for owner in owners]
        masks = None if masks is None else torch.cat([masks, torch.ones(count, *masks.shape[1:])])
        keep = torch.cat([keep, count + keep])
    if small is not None and small_noise is not None:
        random = torch.randn(small.shape, generator=seeded(s.seed, Stream.EXTRA_INPUT, step, micro))
        small = with_noise(small, random, small_noise)
    mine = keep.tolist()
    return Batch(
        x[keep],
        [prompts[i] for i in mine],
        None if masks is None else masks[keep],
        noise[keep],
        t[keep],
        s.batch,
        [said[i] for i in mine],
        None if small is None else small[keep],
    )
