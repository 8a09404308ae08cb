"""Settings of the methods: by name, from text on the command line, and refused in one sentence where they are wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from pcs_trainer.cli.setting_values import as_kind
from pcs_trainer.errors import UsageError
from pcs_trainer.methods import TITLES, method_named, settings_for
from pcs_trainer.methods.start import learner_for
from pcs_trainer.model.text_adapters import adapters
from pcs_trainer.settings import alternatives


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(steps="3"), "steps must be an integer, not '3'"),
        (dict(steps=True), "steps must be an integer"),
        (dict(learning_rate="fast"), "learning_rate must be a number"),
        (dict(learning_rate=float("nan")), "learning_rate"),
        (dict(preview_prompts="a cat"), "preview_prompts must be a list of texts"),
        (dict(rank=-1), "rank must be an"),
        (dict(rank="four"), "rank must be an integer or none"),
        (dict(init="zero"), "init must be one of zero_up"),
        (dict(plan="D"), "plan 'D' is unknown"),
        (dict(augment=True), "no setting 'augment'"),
    ],
)
def test_values_of_the_wrong_kind_are_one_sentence(model, wrong, said):
    with pytest.raises(ValueError, match=said) as error:
        settings_for(model, "personalized_residuals", **wrong)
    assert "\n" not in str(error.value)


def test_a_plan_may_be_called_by_its_long_name(model):
    assert settings_for(model, "dreambooth", plan="rebuild_norms").plan == "A"
    assert settings_for(model, "dreambooth", plan={"mid_block": "rebuild_all"}).plan == {"mid_block": "checkpoint"}


@dataclass
class Kinds:
    """One field of each kind that a setting may have."""

    count: int = 1
    share: float = 0.5
    name: str = ""
    on: bool = False
    rank: int | None = None
    variant: Literal["kv", "causal++"] = "kv"
    stage: Literal["base", "up"] | None = None
    prompts: tuple[str, ...] = ()
    plan: str | dict[str, str] = "A"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("count", "3", 3),
        ("share", "1e-3", 1e-3),
        ("name", "none", "none"),
        ("on", "true", True),
        ("on", "0", False),
        ("rank", "4", 4),
        ("rank", "none", None),
        ("variant", "CAUSAL++", "causal++"),
        ("stage", "up", "up"),
        ("stage", "None", None),
        ("prompts", "a {} at night; a {}", ("a {} at night", "a {}")),
        ("plan", "C", "C"),
    ],
)
def test_a_setting_is_read_by_its_type(name, text, value):
    found = as_kind(name, text, get_type_hints(Kinds)[name])
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("count", "3.5", "--set: count: expected an integer, got '3.5'"),
        ("share", "much", "--set: share: expected a number, got 'much'"),
        ("on", "maybe", "--set: on: expected true or false, got 'maybe'"),
        ("rank", "low", "--set: rank: expected an integer or none, got 'low'"),
        ("variant", "casual++", "--set: variant: expected one of kv, causal++, got 'casual++'; did you mean causal++?"),
        ("stage", "x", "--set: stage: expected one of base, up or none, got 'x'"),
    ],
)
def test_a_wrong_value_of_a_setting_is_one_sentence_with_the_choices(name, text, says):
    with pytest.raises(UsageError) as error:
        as_kind(name, text, get_type_hints(Kinds)[name])
    assert str(error.value) == says


def test_every_setting_of_every_method_can_be_set_by_its_text():
    for method in TITLES:
        for name, kind in get_type_hints(method_named(method).settings).items():
            for one in alternatives(kind):
                texts = {int: "3", float: "0.5", str: "x", bool: "true", type(None): "none"}
                text = texts.get(one) or (get_args(one)[0] if get_origin(one) is Literal else None)
                if text is not None:
                    as_kind(name, text, kind)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(seed=2**70), "seed must be an integer from 0 to"),
        (dict(seed=-1), "seed must be an integer from 0 to"),
        (dict(init_word="  "), "init_word must be a word"),
        (dict(token_learning_rate=float("inf")), "token_learning_rate must be a finite number"),
        (dict(prior_weight=float("nan")), "prior_weight must be a finite number"),
        (dict(batch=2**31), "batch must be at most 10,000, not 2,147,483,648"),
        (dict(resolution=2**31), "resolution must be at most 16,384, not 2,147,483,648"),
    ],
)
def test_numbers_and_words_that_no_run_can_use_are_one_sentence(model, wrong, said):
    with pytest.raises(ValueError, match=said) as error:
        settings_for(model, "personalized_residuals", **wrong)
    assert "\n" not in str(error.value)


def test_a_word_that_textboost_uses_itself_is_refused_before_anything_is_drawn(model):
    with pytest.raises(ValueError, match="TextBoost's word for an augmentation"):
        settings_for(model, "textboost", token="<aug-flip>", augment=True)
    assert settings_for(model, "textboost", token="<aug-flip>", augment=False).token == "<aug-flip>"


def test_a_word_of_an_augmentation_cannot_be_the_subjects(model):
    """And one that merely looks like it stays part of the concept."""
    with pytest.raises(ValueError, match="'<aug-flip>' is TextBoost's word for an augmentation"):
        settings_for(model, "textboost", class_word="mug", token="<aug-flip>", augment=True, variant="v1")
    s = settings_for(model, "textboost", class_word="mug", token="<two>", variant="v1")
    with pytest.raises(ValueError, match="'<two>' is used twice"):
        learner_for(model, [s, s])
    assert not adapters(model.text_encoder).residuals  # what a failed setup had attached is off again
    learner = learner_for(model, [settings_for(model, "textboost", class_word="mug", token="<aug-mine>", variant="v1")])
    assert list(learner.kept_rows()) == ["<aug-mine>"]
    learner.restore()
