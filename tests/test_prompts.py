"""What names a subject, and the prompts of its pictures: rare words, templates, captions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pcs_trainer import load_model
from pcs_trainer.data import prompts
from pcs_trainer.data.batches import Bank, draw_batch, length_notes
from pcs_trainer.methods import settings_for
from pcs_trainer.methods.start import learner_for
from pcs_trainer.methods.templates import PHOTOS
from pcs_trainer.model.autoencoder import Moments
from pcs_trainer.model.tokens import cut_off, has_word
from trainer_cases import cache, pictures, trainer

__all__ = ["cache"]

FAMOUS = ["dbz", "fck", "hmv", "sks", "mgs", "lbj", "dmx", "scp", "ssh", "hpv", "rps", "tmw", "lsd", "wtc", "kkk"]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


class ClipsVocabulary:
    """CLIP's words of three consonants at the end of a vocabulary, in its order; each is one token."""

    def __init__(self):
        rarest_first = (Path(__file__).parent / "clip_three_consonants.txt").read_text().split()
        self.words = {f"{word}</w>": 1000 - i for i, word in enumerate(rarest_first)}

    def get_vocab(self):
        return self.words

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[self.words[f"{text}</w>"]])


def subject(**settings):
    chosen = {"template": "a photo of a {subject}", "token": "<v>", "class_word": "mug"} | settings
    return SimpleNamespace(**chosen)


# the word


def test_rare_tokens_are_single_late_and_short(tiny):
    tokens = prompts.rare_tokens(tiny.tokenizer)
    assert len(tokens) >= 32 and all(len(t) == 3 for t in tokens)
    assert prompts.rare_token(tiny.tokenizer, 0) != prompts.rare_token(tiny.tokenizer, 1)


def test_no_subject_is_named_by_a_famous_abbreviation():
    """As version 0.1.0 did: of CLIP's hundred rarest, each of the first four of these was one."""
    tokenizer = ClipsVocabulary()
    assert len(tokenizer.words) == 734
    given = {prompts.rare_token(tokenizer, seed) for seed in range(prompts.RAREST)}
    assert len(given) == 100 and not given & set(FAMOUS)
    before = {prompts.rare_token(tokenizer, seed, known=True) for seed in range(prompts.RAREST)}
    assert set(FAMOUS[:4]) <= before


@pytest.mark.parametrize(("token", "identifier"), [("zxq", "rare"), ("zwx", "rare"), ("<cup>", "learned")])
def test_a_users_rare_word_of_up_to_three_tokens_is_plain_text(tiny, token, identifier):
    s = prompts.choose_token(tiny, settings_for(tiny, "dreambooth_lora", class_word="mug", token=token))
    assert (s.token, s.identifier) == (token, identifier)
    learner = learner_for(tiny, [s])
    assert list(learner.words) == ([token] if identifier == "learned" else [])
    learner.restore()


def test_a_rare_word_of_more_tokens_is_one_sentence(tiny):
    s = settings_for(tiny, "dreambooth_lora", class_word="mug", token="ohwxq")
    with pytest.raises(ValueError, match=r"'ohwxq' is 4 tokens .* at most 3; choose another, such as 'zxq'"):
        prompts.choose_token(tiny, s)


def test_a_learned_words_start_is_among_its_settings(tiny):
    """So that a run which goes on under another list of rare words starts from its own."""
    s = prompts.choose_token(tiny, settings_for(tiny, "personalized_residuals", class_word="mug", seed=3))
    assert s.init_word == prompts.rare_token(tiny.tokenizer, 3)
    learner = learner_for(tiny, [s])
    assert torch.equal(learner.rows[s.token][0], prompts.first_rows(tiny, s.init_word)[0])
    learner.restore()


@pytest.mark.parametrize(("vectors", "start", "rows"), [(3, "{class}", 3), (1, "red {class}", 2), (2, None, 2)])
def test_a_learned_word_has_as_many_embeddings_as_were_asked_for(tiny, vectors, start, rows):
    chosen = settings_for(tiny, "textual_inversion", class_word="mug", token="<v>", token_vectors=vectors)
    s = prompts.choose_token(tiny, replace(chosen, init_word=start))
    learner = learner_for(tiny, [s])
    assert len(learner.rows["<v>"][0]) == rows == prompts.word_size(tiny.tokenizer, s)
    learner.restore()


# the prompt


def test_the_subjects_prompt():
    s = subject()
    assert prompts.subject_prompt(s) == "a photo of a <v> mug"
    assert prompts.subject_prompt(s, "a red mug on a table") == "a red <v> mug on a table"
    assert prompts.subject_prompt(s, "the {subject} outside") == "the <v> mug outside"
    assert prompts.subject_prompt(s, "something by the sea") == "<v> mug, something by the sea"


def test_a_prompt_may_name_the_token_alone():
    s = subject(template=("a photo of {token}", "my {token}"))
    assert prompts.subject_prompts(s) == ("a photo of <v>", "my <v>") and prompts.own_words(s) == "<v>"
    assert prompts.subject_prompt(s, "a red mug on a table") == "a red <v> on a table"
    assert prompts.subject_prompt(s, "{token} and a {subject}") == "<v> and a <v> mug"
    assert prompts.own_words(subject(template=("{token}", "a {subject}"))) == "<v> mug"
    for method, first in (("textual_inversion", "a photo of <v>"), ("textboost", "a photo of <v>")):
        own = settings_for(None, method, class_word="mug", token="<v>")
        assert prompts.subject_prompt(own) == first
    assert len(set(PHOTOS)) == len(PHOTOS) >= 20 and all("{token}" in text for text in PHOTOS)
    with pytest.raises(ValueError, match=r"must hold \{subject\} or \{token\}, .* it is 'my mug'"):
        settings_for(None, "textual_inversion", template=("a {token}", "my mug"))
    with pytest.raises(ValueError, match="must hold"):
        settings_for(None, "textual_inversion", template=())


def test_a_caption_names_the_subject_by_a_whole_word():
    s = subject(token="sks", class_word="dog")
    assert prompts.subject_prompt(s, "a dog between two desks") == "a sks dog between two desks"
    assert prompts.subject_prompt(s, "a Sks dog by desks") == "a Sks dog by desks"
    assert has_word("<v>, by the sea", "<v>") and not has_word("a ribbon", "bon") and not has_word("a", "")


def test_each_picture_of_a_step_has_one_of_its_prompts():
    moments = Moments(torch.randn(2, 2, 4, 4), torch.rand(2, 2, 4, 4))
    bank = Bank(moments, ["a", "x"], others=[("b", "c"), ()])
    s = SimpleNamespace(seed=3, batch=4)

    def said(step, one=bank):
        return draw_batch(one, None, ["A", "X"], s, step, 0, (0, 1), lambda n, g: torch.randint(9, (n,), generator=g))

    drawn = [said(step) for step in range(30)]
    pairs = {(name, prompt) for batch in drawn for name, prompt in zip(batch.names, batch.prompts, strict=True)}
    assert pairs == {("A", "a"), ("A", "b"), ("A", "c"), ("X", "x")} and bank.every_prompt == ["a", "x", "b", "c"]
    assert said(7).prompts == drawn[7].prompts
    plain = said(7, Bank(moments, ["a", "x"]))  # the other random numbers of a step are what they were
    assert torch.equal(plain.noise, drawn[7].noise) and plain.names == drawn[7].names


@pytest.mark.slow
def test_a_run_trains_on_all_its_templates_and_records_how_it_names_the_subject(tiny):
    given = dict(template=("a {token}", "my {token}"), identifier="learned", steps=2, batch=2)
    t = trainer(tiny, "dreambooth_lora", **given)
    objective = t.objective()
    batches = [objective.batch(step, 0) for step in range(6)]
    assert {"a <mug>", "my <mug>"} <= {prompt for batch in batches for prompt in batch.prompts}
    assert all(len(objective.text(objective.inputs(batch)).states) == len(batch.t) for batch in batches)
    t.learner.restore()
    concept = trainer(tiny, "dreambooth_lora", **given).train()
    assert concept.subject_words == "<mug>" and concept.class_word == "mug" and concept.instance_prompt == "a <mug>"


# the text encoder's length


def test_what_the_length_takes_from_a_prompt(tiny):
    long = " ".join(["red"] * 30)
    assert cut_off(tiny.tokenizer, f"{long} <v>", {"<v>": 2}, "<v>") == (0, False)
    assert cut_off(tiny.tokenizer, f"<v> {long} {long}", {"<v>": 2}, "<v>") == (24, False)
    assert cut_off(tiny.tokenizer, f"{long} red red red red red red red <v>", {"<v>": 2}, "<v>") == (1, True)
    assert cut_off(tiny.tokenizer, f"{long} {long} zwx", {}, "zwx") == (25, True)


def test_a_caption_that_loses_the_subject_is_named_before_anything_is_drawn(tiny):
    """The embedded text encoder reads 38 tokens; with no word left a step would train on nothing of the subject."""
    t = trainer(tiny, "textual_inversion", template="a photo of {token}")
    picture = t.subjects[0].pictures[0]
    picture.caption = "mug " + " ".join(["red"] * 40)
    assert length_notes(tiny, t.subjects, False) == [
        "the prompt of array has 41 tokens and the text encoder reads 38: the rest is cut off"
    ]
    picture.caption = " ".join(["red"] * 40) + " mug"
    with pytest.raises(ValueError, match=r"the prompt of array has 41 .* before '<mug>' comes; name the subject earl"):
        t.objective()
    picture.caption = " ".join(["red"] * 36) + " mug"
    assert length_notes(tiny, t.subjects, False) == []
    with pytest.raises(ValueError, match="before '<mug>' comes"):  # words for what was done to a picture come first
        length_notes(tiny, t.subjects, True)


# a run that goes on


@pytest.mark.slow
def test_a_run_goes_on_with_what_it_began_with(tiny, tmp_path):
    """Defaults change between versions: what nobody asked for is the checkpoint's, what was asked for is compared."""
    given = dict(out=tmp_path, probe_every=0, batch=1)
    trainer(tiny, "textual_inversion", steps=1, template="an old {subject}", **given).train()
    t, events = trainer(tiny, "textual_inversion", steps=2, **given), []
    concept = t.train(on_event=events.append, resume=True)
    assert concept.instance_prompt == "an old <mug> mug" and concept.subject_words == "<mug> mug"
    assert any("goes on with what the run began with: template" in e.data.get("text", "") for e in events)
    with pytest.raises(ValueError, match=r"template was 'an old {subject}' and is 'a {token}'"):
        trainer(tiny, "textual_inversion", steps=3, template="a {token}", **given).train(resume=True)


@pytest.mark.slow
def test_subjects_that_go_on_keep_their_words(tiny, tmp_path, monkeypatch):
    """Each of several subjects has a rare word of its own; another list of rare words does not move them."""
    from pcs_trainer.training.trainer import Trainer

    both = [{"images": pictures(), "class_word": "mug"}, {"images": pictures(seed=62), "class_word": "cat"}]
    given = dict(concepts=both, out=tmp_path, batch=1, check_backend=False, probe_every=0)
    first = Trainer(tiny, "dreambooth_lora", steps=1, prior_weight=0.0, **given)
    names = [subject.settings.token for subject in first.subjects]
    first.train()
    monkeypatch.setattr(prompts, "KNOWN", prompts.KNOWN | set(names))
    second = Trainer(tiny, "dreambooth_lora", steps=2, prior_weight=0.0, **given)
    assert not {subject.settings.token for subject in second.subjects} & set(names)
    assert [token for token, _ in second.train(resume=True).subjects] == names
