"""The methods: each a module with `setup`, which puts what trains on the model, and what else its paper asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..unet.layers import replace_data

if TYPE_CHECKING:
    from ..model.model import Model
    from ..settings import Settings

MODULES = {
    "dreambooth": "dreambooth",
    "dreambooth_lora": "dreambooth",
    "custom_diffusion": "custom_diffusion",
    "personalized_residuals": "personalized_residuals",
    "textboost": "textboost",
    "textual_inversion": "textual_inversion",
}


@dataclass
class Learner:
    """What a method's setup returns: what trains, what a concept takes from it, how to take it off the model.

    parameters: by the names that the concept file gives them; a learned word's rows are "word.{encoder}.{word}".
    """

    parameters: dict[str, nn.Parameter]
    tensors: Callable[[], dict[str, Tensor]]
    words: dict[str, list[Tensor]] = field(default_factory=dict)
    undo: list[Callable[[], Any]] = field(default_factory=list)
    text_trains: bool = False  # the text states have a gradient, so they are computed in every step
    hold_first: bool = False
    whole: bool = False  # a whole network trains: several processes share it instead of each holding all
    seldom: tuple[str, ...] = ()  # parameters that a short run may never reach

    def restore(self) -> None:
        """The model as it was before setup."""
        for undo in reversed(self.undo):
            undo()
        self.undo.clear()


def module_of(method: str) -> Any:
    return import_module(f".{MODULES[method]}", __name__)


def setup(model: Model, settings: Settings) -> Learner:
    return module_of(settings.method).setup(model, settings)


def add_words(learner: Learner, rows: dict[str, list[Tensor]], train: bool) -> None:
    """Give the learner words with first rows; trained ones are parameters of their own, apart from any table."""
    for word, parts in rows.items():
        if train:
            parts = [nn.Parameter(part) for part in parts]
            learner.parameters.update({f"word.{e}.{word}": p for e, p in enumerate(parts)})
            learner.text_trains = True
        learner.words[word] = list(parts)


def subject_rows(model: Model, s: Settings) -> dict[str, list[Tensor]]:
    """The subject's word, if it is a learned one, and what it starts from: a rare word, or the words of init_word."""
    from ..data.prompts import first_rows, rare_token

    if s.identifier != "learned":
        return {}
    if s.init_word:
        return {s.token: first_rows(model, s.init_word.replace("{class}", s.class_word))}
    return {s.token: first_rows(model, rare_token(model.tokenizers[0], s.seed), s.token_vectors)}


def train_weights(names: dict[str, nn.Parameter], learner: Learner, masters: bool) -> None:
    """Let parameters of the model itself train (in float32 where `masters`), and know how to put them back."""
    for name, parameter in names.items():
        original = parameter.data
        replace_data(parameter, original.float().clone() if masters else original.clone())
        parameter.requires_grad_(True)
        learner.parameters[name] = parameter

        def undo(parameter: nn.Parameter = parameter, original: Tensor = original) -> None:
            parameter.requires_grad_(False)
            parameter.grad = None
            replace_data(parameter, original)

        learner.undo.append(undo)
