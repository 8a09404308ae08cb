"""Changes to a method that no setting of the trainer makes, for the ablations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from pcs_trainer.methods.learner import Learner
    from pcs_trainer.methods.personalized_residuals import Residuals
    from pcs_trainer.model.model import Model


@contextmanager
def untold() -> Iterator[None]:
    """TextBoost's augmentation without the words that name it: images are changed, prompts are not."""
    from pcs_trainer.data import augment

    told = augment.textboost

    def without_words(*given: Any) -> augment.Augmented:
        return replace(told(*given), prefix="")

    with mock.patch.object(augment, "textboost", without_words):
        yield


@contextmanager
def keys_and_values() -> Iterator[None]:
    """Personalized Residuals on the text's keys and values in place of proj_out, with as many parameters."""
    from pcs_trainer.methods import personalized_residuals

    changed = replace(personalized_residuals.METHOD, setup=setup_keys_and_values)
    with mock.patch.object(personalized_residuals, "METHOD", changed):
        yield


def setup_keys_and_values(model: Model, s: Residuals, learner: Learner) -> None:
    """Low-rank pairs on attn2.to_k and attn2.to_v; the two ranks sum to what proj_out's parameters pay for."""
    from pcs_trainer.methods.learner import fresh_pair
    from pcs_trainer.methods.personalized_residuals import RANK_SHARE

    layers = dict(model.unet.named_modules())
    widths = [layer.weight.shape[0] for name, layer in layers.items() if name.endswith(".proj_out")]
    paid = sum(2 * width * (s.rank or max(1, round(RANK_SHARE * width))) for width in widths)
    one = sum(sum(layer.weight.shape) for name, layer in layers.items() if name.endswith("attn2.to_k"))  # rank 1 on all
    both = round(paid / one)
    ranks = {"attn2.to_k": both // 2, "attn2.to_v": both - both // 2}
    for name, layer in layers.items():
        for ending, rank in ranks.items():
            if name.endswith(ending) and rank:
                learner.attach("unet", name, fresh_pair(layer, rank, s.init, learner.generator))
    learner.add_subject_word(s)


VARIANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "": nullcontext,
    "untold": untold,
    "keys_and_values": keys_and_values,
}
