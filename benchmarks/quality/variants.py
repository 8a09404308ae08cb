"""Changes to a method that no setting of the trainer makes, for the ablations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch


@contextmanager
def untold() -> Iterator[None]:
    """TextBoost's augmentation without the words that name it: the pictures are changed, the prompts are not."""
    from pcs_trainer.methods import textboost

    told = textboost.augmented

    def without_words(*given: Any) -> Any:
        return replace(told(*given), prefix="")

    with mock.patch.object(textboost, "augmented", without_words):
        yield


@contextmanager
def keys_and_values() -> Iterator[None]:
    """Personalized Residuals on the text's keys and values in place of proj_out, with as many parameters."""
    from pcs_trainer.methods import personalized_residuals

    with mock.patch.object(personalized_residuals, "setup", setup_keys_and_values):
        yield


def setup_keys_and_values(model: Any, s: Any) -> Any:
    """Low-rank pairs on attn2.to_k and attn2.to_v; the two ranks sum to what proj_out's parameters pay for."""
    from pcs_trainer.unet.layers import LowRank
    from pcs_trainer.methods import Learner, add_words, subject_rows
    from pcs_trainer.methods.dreambooth import fresh_pair

    layers = dict(model.unet.named_modules())
    paid = sum(2 * s.rank * layer.weight.shape[0] for name, layer in layers.items() if name.endswith(".proj_out"))
    keys = {n: x for n, x in layers.items() if n.endswith("attn2.to_k")}
    one = sum(sum(layer.weight.shape) for layer in keys.values())  # of rank 1 on every to_k
    both = round(paid / one)
    ranks = {"attn2.to_k": both // 2, "attn2.to_v": both - both // 2}
    learner, generator, pairs = Learner({}, lambda: {}), torch.Generator().manual_seed(s.seed), {}
    for name, layer in layers.items():
        for ending, rank in ranks.items():
            if name.endswith(ending) and rank:
                down, up = fresh_pair(layer, rank, s.init, generator)
                model.unet.attach(name, LowRank(down, up, key="learning"))
                pairs |= {f"unet.{name}.down": down, f"unet.{name}.up": up}
    learner.parameters |= pairs
    learner.undo.append(lambda: model.unet.detach("learning"))
    add_words(learner, subject_rows(model, s), s.train_token)
    learner.tensors = lambda: {n: p.detach().clone() for n, p in pairs.items()}
    return learner


VARIANTS = {"": nullcontext, "untold": untold, "keys_and_values": keys_and_values}
