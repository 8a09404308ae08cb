"""pcs merge --rename: which subject of which concept gets another word, and what cannot be one."""

from __future__ import annotations

import shlex

import pytest
import torch
from pcs_trainer.cli import entry as cli
from pcs_trainer.cli.commands import command
from pcs_trainer.cli.commands.merge import check, renamed
from pcs_trainer.cli.config import effective
from pcs_trainer.cli.options import parse
from pcs_trainer.concept.blending import blend
from pcs_trainer.concept.concept import Concept
from pcs_trainer.concept.loading import load_concept
from pcs_trainer.errors import UsageError
from test_concept import concept_of


def concept(*words: str, learned: bool = True, number: float = 1.0) -> Concept:
    """A concept of one subject or of several that were learned together."""
    rows = {word: [torch.full((1, 4), number)] for word in words} if learned else {}
    meta = {"token": words[0], "class_word": "mug"}
    if len(words) > 1:
        meta["subjects"] = "[" + ", ".join(f'["{word}", "mug"]' for word in words) + "]"
    return Concept("personalized_residuals", {}, rows, meta)


def words_of(concepts: list[Concept]) -> list[list[str]]:
    return [[token for token, _ in c.subjects] for c in concepts]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], [["<a>", "<b>"], ["<b>", "<c>"]]),
        (["<b>=<x>"], [["<a>", "<x>"], ["<b>", "<c>"]]),
        (["<b>=<x>", "<b>=<y>"], [["<a>", "<x>"], ["<y>", "<c>"]]),
        (["<a>=<z>", "<c>=<a>"], [["<z>", "<b>"], ["<b>", "<a>"]]),
        (["<b>=<c>", "<c>=<y>"], [["<a>", "<c>"], ["<b>", "<y>"]]),  # each old word is one that was there at first
        (["<x>", "<y>"], [["<x>", "<b>"], ["<y>", "<c>"]]),
    ],
)
def test_each_new_word_goes_to_the_subject_it_names(texts, expected, capsys):
    both = renamed([concept("<a>", "<b>"), concept("<b>", "<c>")], texts)
    assert words_of(both) == expected and [list(c.words) for c in both] == expected
    said = capsys.readouterr().err
    plain = bool(texts) and "=" not in texts[0]
    assert ("--rename <x> renames <a>, the first of 2 subjects; to say which: --rename '<a>=<x>' or" in said) == plain


def test_one_of_several_subjects_that_cannot_be_told_is_asked_for():
    merged = blend([concept("<a>"), concept("<b>")], [1, 1])
    with pytest.raises(UsageError, match="has 2 subjects; say which: --rename '<a>=<x>' or --rename '<b>=<x>'"):
        renamed([merged, concept("<c>")], ["<x>", "<y>"])
    assert words_of(renamed([merged], ["<b>=<x>"])) == [["<a>", "<x>"]]
    with pytest.raises(UsageError, match="no concept has a subject '<x>' to rename; left to rename: <a>, <b>"):
        renamed([merged], ["<x>=<y>"])
    with pytest.raises(UsageError, match="'<a>' to rename; left to rename: <b>"):
        renamed([merged], ["<a>=<x>", "<a>=<y>"])


def test_a_word_of_the_tokenizer_is_guarded_in_a_blend():
    blended = blend([concept("zxq", learned=False), concept("<b>")], [1, 1])
    with pytest.raises(ValueError, match="'zxq' is a word of the tokenizer"):
        renamed([blended], ["zxq=<x>"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("'<x>,<z>' '<y>'", "--rename: '<x>,<z>' holds a comma, and a subject has one word"),
        ("'<a>=my mug'", "'my mug' holds a space"),
        ("'=<x>'", "'=<x>' has no word before its '='"),
        ("'<a>='", "the new word is blank"),
        ("'<a>=<x>' '<y>'", "give OLD=NEW each time, or a new token for each concept in their order, not both"),
        ("'<y>'", "--rename is given 1 times for 2 concepts"),
        (f"'<a>={'x' * 300}'", "the word 'xxxxxxxxxxxxxxxxxxxx...' has 300 bytes"),
    ],
)
def test_a_wrong_renaming_is_one_sentence_before_anything_is_loaded(flags, says, tmp_path):
    files = [concept(word).save(tmp_path / f"{i}.safetensors") for i, word in enumerate(("<a>", "<b>"))]
    words = [str(file) for file in files] + [w for text in shlex.split(flags) for w in ("--rename", text)]
    with pytest.raises(UsageError) as error:
        check(effective(command("merge"), parse(command("merge"), words)))
    assert says in str(error.value)


@pytest.mark.slow
def test_from_the_command_line(model, tmp_path, capsys):
    rows = concept_of(model).words["<dog>"]
    pair = {"token": "<dog>", "class_word": "cat", "subjects": '[["<dog>", "cat"], ["<cup>", "mug"]]'}
    concept_of(model, meta=pair, words={"<dog>": rows, "<cup>": rows}).save(tmp_path / "a.safetensors")
    concept_of(model, words={"<dog>": [rows[0] * 2]}).save(tmp_path / "b.safetensors")
    line = [
        "merge",
        str(tmp_path / "a.safetensors"),
        str(tmp_path / "b.safetensors"),
        "--how",
        "blend",
        "--device",
        "cpu",
    ]
    line += ["--how", "blend", "--weight", "0.5", "--weight", "0.5", "--out", str(tmp_path / "out.safetensors")]
    assert cli.main(line) == 1 and "both use the word '<dog>'" in capsys.readouterr().err
    assert cli.main([*line, "--rename", "<dog>=<rex>", "--rename", "<cup>=<can>"]) == 0
    assert "holds <rex> cat and <can> mug and <dog> cat" in capsys.readouterr().err
    merged = load_concept(tmp_path / "out.safetensors", model)
    assert merged.subjects == [("<rex>", "cat"), ("<can>", "mug"), ("<dog>", "cat")]
    assert torch.equal(merged.words["<can>"][0], rows[0]) and torch.equal(merged.words["<dog>"][0], rows[0] * 2)


def test_two_subjects_do_not_end_under_one_word():
    with pytest.raises(UsageError, match="two subjects would be called '<b>'"):
        renamed([concept("<a>"), concept("<b>")], ["<a>=<b>"])
