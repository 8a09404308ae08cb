"""What a method is: the contract between a method's file and all that runs, plans, reports and documents methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.augment import Augmentation
from ..model.model import Model
from ..settings import Settings
from ..unet.blocks import TextKV
from .learner import Learner


class SideLoss(NamedTuple):
    """A further loss of each micro-batch, apart from its pictures."""

    draw: Callable[[torch.Generator], Any]  # what it reads this time, on the CPU: tensors, or dataclasses of them
    loss: Callable[[Any], Tensor]  # of that, on the model's device


def _nothing(*_: Any) -> None:
    """The neutral hook."""


def _no_more(_given: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _unchanged(kv: TextKV) -> TextKV:
    return kv


@dataclass(frozen=True, kw_only=True)
class Method:
    """A personalization method. Everything but the first five has a neutral default.

    `s` below is an instance of the method's own `settings`.
    """

    settings: type[Settings]  # its defaults are the paper's values
    setup: Callable[[Model, Any, Learner], None]  # (model, s, learner): put what trains on the model, tell the learner
    paper: str  # its address
    trains: str  # what trains, in a few words
    choose: str  # when to choose it

    tiny: Mapping[str, Any] = field(default_factory=dict)  # other defaults on the embedded model, 1000 times smaller
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> settings that are given together
    augment: Callable[[Any], Augmentation | None] = _nothing  # (s): how photos are varied before training
    hold_text: Callable[[TextKV], TextKV] = _unchanged  # such as no gradient through the first token
    side_loss: Callable[[Model, Sequence[Any]], SideLoss | None] = _nothing  # (model, s of each subject): once a run
    reads_more_text: Callable[[Any], bool] = lambda s: False  # whether that loss encodes further prompts in each step
    # after every step, a skipped one too; on the device alone, such as limiting the norm of token embeddings
    after_step: Callable[[Model, Learner], None] = _nothing
    # (s): variance of the noise on the small picture that an up-scaler reads; None where no up-scaler is trained
    extra_input: Callable[[Any], float | None] = _nothing
    implied: Callable[[Mapping[str, Any]], dict[str, Any]] = _no_more  # (given settings): defaults that go with them
    trains_whole_unet: bool = False  # so that none of its weights can be held in 8 bits
    lag: bool = False  # whether the paper samples with localized attention guidance
    one_subject: Callable[[Any], str | None] = _nothing  # (s): why several subjects cannot be learned together
