"""The names of a concept's tensors: every slot is spelled and read back, and a malformed name is one sentence."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pcs_trainer.concept.grammar import (
    LOW_RANK,
    OWN_WORD,
    PARTS,
    TEXT_PARTS,
    Half,
    Kind,
    Slot,
    causal_names,
    context_names,
    difference_name,
    half_of,
    is_word,
    names,
    pair_names,
    parse,
    partner,
    spell,
    value_name,
    word_name,
)

PIECE = st.text("abcxyz_0123456789", min_size=1, max_size=12).filter(lambda piece: piece not in ("diff", "down", "up"))
LAYER = st.lists(PIECE, min_size=1, max_size=5).map(".".join).filter(lambda name: not name.endswith("causal_down"))
WORD = st.text("ab<>-_.: é雪", min_size=1, max_size=12)
NAME = st.tuples(
    st.sampled_from([*PARTS, "context", "word", "a", ""]),
    st.text("ab01.", max_size=8),
    st.sampled_from(["", ".down", ".up", ".causal_down", ".causal_up", ".diff", ".weight"]),
).map(lambda name: f"{name[0]}.{name[1]}{name[2]}")
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # other work may hold the processor


@st.composite
def slots(draw) -> Slot:
    kind = draw(st.sampled_from(Kind))
    parts = {Kind.CONTEXT: PARTS[:1], Kind.CAUSAL: TEXT_PARTS, Kind.WORD: TEXT_PARTS}.get(kind, PARTS)
    return Slot(draw(st.sampled_from(parts)), draw(WORD if kind is Kind.WORD else LAYER), kind)


@UNHURRIED
@given(slots())
def test_every_slot_is_read_back_from_each_of_its_names(slot):
    halves = list(Half) if slot.kind in LOW_RANK else [None]
    assert names(slot) == tuple(spell(slot, half) for half in halves)
    for half in halves:
        name = spell(slot, half)
        assert parse(name) == slot and half_of(name) is half and is_word(name) == (slot.kind is Kind.WORD)


@UNHURRIED
@given(slots(), slots())
def test_no_two_slots_share_a_name_or_a_stem(a, b):
    if a != b:
        assert not set(names(a)) & set(names(b))
        assert a.stem != b.stem or not {a.kind, b.kind} <= LOW_RANK


@UNHURRIED
@given(NAME)
def test_a_name_is_the_spelling_of_its_slot_or_one_sentence(name):
    try:
        slot, half = parse(name), half_of(name)
    except ValueError as error:
        assert repr(name) in str(error) and "\n" not in str(error)
    else:
        assert spell(slot, half) == name


@pytest.mark.parametrize("name, slot", [
    ("unet.mid_block.attentions.0.proj_out.down", Slot("unet", "mid_block.attentions.0.proj_out", Kind.PAIR)),
    ("text_encoder_2.text_model.encoder.layers.1.mlp.fc2.up",
     Slot("text_encoder_2", "text_model.encoder.layers.1.mlp.fc2", Kind.PAIR)),
    ("text_encoder.text_model.encoder.layers.0.mlp.fc2.causal_down",
     Slot("text_encoder", "text_model.encoder.layers.0.mlp.fc2", Kind.CAUSAL)),
    ("context.mid_block.attentions.0.transformer_blocks.0.up",
     Slot("unet", "mid_block.attentions.0.transformer_blocks.0", Kind.CONTEXT)),
    ("unet.conv_in.weight", Slot("unet", "conv_in.weight", Kind.VALUE)),
    ("unet.conv_in.weight.diff", Slot("unet", "conv_in.weight", Kind.DIFFERENCE)),
    ("word.0.<dog>", Slot("text_encoder", "<dog>", Kind.WORD)),
    ("word.1.a.down", Slot("text_encoder_2", "a.down", Kind.WORD)),
])  # fmt: skip
def test_the_names_that_files_hold(name, slot):
    """These strings are in files that people have: they may never change."""
    assert parse(name) == slot and name in names(slot)


@pytest.mark.parametrize("name", [
    "", "unet", "unet.", "unet..down", "unet.a..b", "unet.a.", ".unet.a", "text_encoder_3.a.down", "vae.a",
    "unet.a.causal_down", "context.", "context.a", "context.a.diff", "context.a.causal_up", "word.", "word.0",
    "word.0.", "word.2.<dog>", "word.x.<dog>", "word.-1.<dog>", "strange.weight", "UNET.a.down",
])  # fmt: skip
def test_a_malformed_name_is_one_sentence_that_quotes_it(name):
    with pytest.raises(ValueError, match="does not name a tensor of a concept; expected unet") as error:
        parse(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("slot, half", [
    (Slot("unet", "a.down", Kind.VALUE), None),
    (Slot("unet", "a.diff", Kind.VALUE), None),
    (Slot("unet", "a", Kind.CAUSAL), Half.UP),
    (Slot("unet", "a", Kind.WORD), None),
    (Slot("text_encoder", "a", Kind.CONTEXT), Half.UP),
    (Slot("unet", "", Kind.PAIR), Half.UP),
])  # fmt: skip
def test_a_slot_that_no_name_says_is_not_spelled(slot, half):
    with pytest.raises(ValueError, match=f"no name says {slot.kind.name}"):
        spell(slot, half)


def test_a_half_belongs_to_low_rank_residuals_alone():
    with pytest.raises(ValueError, match="PAIR needs a half"):
        spell(Slot("unet", "a", Kind.PAIR))
    with pytest.raises(ValueError, match="VALUE has no down"):
        spell(Slot("unet", "a", Kind.VALUE), Half.UP)
    assert partner("unet.a.down") == "unet.a.up" and partner("context.a.up") == "context.a.down"
    assert partner("text_encoder.a.causal_down") == "text_encoder.a.causal_up" and partner("unet.a.weight") is None
    assert OWN_WORD < LOW_RANK


def test_the_helpers_spell_what_methods_learn():
    assert pair_names("unet", "a.b") == ("unet.a.b.down", "unet.a.b.up")
    assert causal_names("text_encoder", "a") == ("text_encoder.a.causal_down", "text_encoder.a.causal_up")
    assert context_names("a.b") == ("context.a.b.down", "context.a.b.up")
    assert value_name("unet", "a.weight") == "unet.a.weight"
    assert difference_name("unet", "a.bias") == "unet.a.bias.diff"
    assert word_name(1, "<dog>") == "word.1.<dog>" and is_word("word.0.x") and not is_word("unet.word.x")
    with pytest.raises(ValueError, match="numbered 0 to 1"):
        word_name(2, "<dog>")


CONCEPT = Path(__file__).parents[1] / "python" / "pcs_trainer" / "concept"
STARTS = ("unet.", "text_encoder.", "text_encoder_2.", "context.", "word.")
ENDS = (".down", ".up", ".causal_down", ".causal_up", ".diff")


@pytest.mark.parametrize("file", sorted(CONCEPT.rglob("*.py")), ids=lambda file: file.relative_to(CONCEPT).as_posix())
def test_only_the_grammar_spells_prefixes_and_endings(file):
    tree = ast.parse(file.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    spelled = [
        f"{file.name}:{node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
        if node.value.startswith(STARTS) or node.value.endswith(ENDS)
    ]
    assert bool(spelled) == (file.name == "grammar.py"), f"ask concept/grammar.py instead: {spelled}"
