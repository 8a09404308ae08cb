"""A concept: its file, its place on the model, what broken files say."""

import pickle
from pathlib import Path

import pytest
import torch
from pcs_trainer import load_model
from pcs_trainer.concept.attach import attached, predict
from pcs_trainer.concept.blending import blend
from pcs_trainer.concept.concept import Concept, subject_words
from pcs_trainer.concept.grammar import Kind
from pcs_trainer.concept.loading import load_concept
from pcs_trainer.files import read_header, write_safetensors
from pcs_trainer.model.fingerprint import fingerprint, same_base
from pcs_trainer.model.text import encode


def residuals(model, rank=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, p in model.unet.named_parameters():
        if name.endswith("proj_out.weight"):
            stem = "unet." + name.removesuffix(".weight")
            tensors[f"{stem}.down"] = torch.randn(rank, p.shape[1], generator=g) / rank
            tensors[f"{stem}.up"] = 0.1 * torch.randn(p.shape[0], rank, generator=g)
    return tensors


def concept_of(model, **more):
    width = model.text_encoder.get_input_embeddings().weight.shape[1]
    rows = torch.randn(2, width, generator=torch.Generator().manual_seed(3)) * 0.02
    meta = {"token": "<dog>", "class_word": "cat", "base_name": "a"}
    concept = Concept("personalized_residuals", residuals(model), {"<dog>": [rows]}, meta, fingerprint(model))
    for name, value in more.items():
        setattr(concept, name, value)
    return concept


def test_a_file_brings_back_the_same_concept(model, tmp_path):
    concept = concept_of(model)
    concept.save(tmp_path / "dog.safetensors")
    again = load_concept(tmp_path / "dog.safetensors", model)
    assert torch.equal(predict(model, [concept], "a <dog> cat"), predict(model, [again], "a <dog> cat"))
    assert again.meta["class_word"] == "cat" and again.method == concept.method and again.base == concept.base
    assert [f.name for f in tmp_path.iterdir()] == ["dog.safetensors"]


def test_putting_on_and_taking_off_leaves_the_base_as_it_was(model):
    before = predict(model, [], "a red mug")
    text = model.text_encoder
    name, weight = next((n, p) for n, p in text.named_parameters() if n.endswith("fc1.weight"))
    tensors = residuals(model) | {
        "unet.conv_in.weight": model.unet.conv_in.weight * 1.1,
        "unet.conv_out.bias.diff": torch.ones_like(model.unet.conv_out.bias),
        f"text_encoder.text_model.{name.removeprefix('text_model.')}": weight * 0.9,
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.down": torch.randn(2, weight.shape[1]),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.up": torch.randn(weight.shape[1], 2),
    }
    concept = concept_of(model, tensors=tensors)
    with attached(model, [concept]):
        changed = predict(model, [], "a red mug")
    assert not torch.equal(changed, before)
    assert torch.equal(predict(model, [], "a red mug"), before)


def test_strength_zero_is_the_base_and_half_lies_between(model):
    whole = {"unet.conv_out.weight": torch.zeros_like(model.unet.conv_out.weight)}
    concept = concept_of(model, tensors=whole, words={})
    base = model.unet.conv_out.weight.detach().clone()
    with attached(model, [concept], [0.0]):
        assert torch.equal(model.unet.conv_out.weight, base)
    with attached(model, [concept], [0.5]):
        torch.testing.assert_close(model.unet.conv_out.weight, base * 0.5)
    with pytest.raises(ValueError, match="one strength for each"), attached(model, [concept], [0.5, 0.5]):
        pass


def test_two_concepts_of_one_name_are_refused_and_can_be_renamed(model):
    a, b = concept_of(model), concept_of(model)
    with pytest.raises(ValueError, match="renamed"), attached(model, [a, b]):
        pass
    with attached(model, [a, b.renamed("<cat>")]) as words:
        assert set(words) == {"<dog>", "<cat>"}
    assert not any(layer.residuals for layer in model.unet.modules() if hasattr(layer, "residuals"))


def test_the_subjects_of_a_concept_and_their_words(model):
    one = concept_of(model)
    assert one.subjects == [("<dog>", "cat")] and one.subject_words == "<dog> cat"
    assert subject_words("", "cat") == "cat" and subject_words("<dog>", "") == "<dog>" and subject_words("", "") == ""
    several = concept_of(model, meta=one.meta | {"subjects": '[["<dog>", "cat"], ["<cup>", "mug"]]'})
    assert several.subjects == [("<dog>", "cat"), ("<cup>", "mug")]
    assert several.renamed("<rex>").subjects == [("<rex>", "cat"), ("<cup>", "mug")]
    assert one.renamed("<rex>").subjects == [("<rex>", "cat")]
    both = blend([concept_of(model, tensors={}), several.renamed("<rex>")], [0.5, 0.5])
    assert both.subjects == [("<dog>", "cat"), ("<rex>", "cat"), ("<cup>", "mug")]


def test_a_concept_of_several_subjects_is_spoken_of_as_each(model):
    pair = {"subjects": '[["sks", "cat"], ["<cup>", "mug"]]', "instance_prompt": "photo of a sks cat by desks"}
    rows = concept_of(model).words["<dog>"]
    learned = {"sks": rows, "<cup>": rows}
    joint = concept_of(model, meta={"token": "sks", "class_word": "cat"} | pair, words=learned)
    assert joint.subject_words == "sks cat and <cup> mug"
    first, second = joint.of_subject(0), joint.of_subject(1)
    assert (first.token, first.subject_words, first.instance_prompt) == ("sks", "sks cat", pair["instance_prompt"])
    assert (second.token, second.class_word, second.subjects) == ("<cup>", "mug", [("<cup>", "mug")])
    assert second.instance_prompt == "photo of a <cup> mug by desks"
    renamed = joint.renamed("<rex>")
    assert (
        renamed.instance_prompt == "photo of a <rex> cat by desks"
        and renamed.subject_words == "<rex> cat and <cup> mug"
    )
    other = joint.renamed("<can>", of="<cup>")
    assert other.subjects == [("sks", "cat"), ("<can>", "mug")] and other.token == "sks"
    with pytest.raises(ValueError, match="has the subjects 'sks', '<cup>', and not '<x>'"):
        joint.renamed("<rex>", of="<x>")
    merged = blend([concept_of(model, tensors={}), joint], [0.5, 0.5])
    with pytest.raises(ValueError, match="say which one is renamed by of="):
        merged.renamed("<rex>")
    assert merged.renamed("<rex>", of="<cup>").subject_words == "<dog> cat and sks cat and <rex> mug"


def test_a_token_by_itself_names_the_subject_where_it_was_learned_so(model):
    alone = concept_of(model, meta={"token": "<dog>", "class_word": "cat", "names": '["<dog>"]'})
    assert alone.subject_words == "<dog>" and alone.renamed("<rex>").subject_words == "<rex>"
    joined = blend(
        [alone, concept_of(model, tensors={}, words={}, meta={"token": "<cup>", "class_word": "mug"})], [1, 1]
    )
    assert joined.names == ["<dog>", "<cup> mug"] and joined.instance_prompt == "a photo of a <dog> and a <cup> mug"
    only = blend([alone, concept_of(model, tensors={}, words={}, meta={})], [1, 1])  # the second has no word
    assert (only.token, only.class_word, only.subject_words) == ("<dog>", "cat", "<dog>")


def test_an_ordinary_word_for_which_the_model_was_changed_has_no_other_name(model):
    concept = concept_of(model, meta={"token": "zxq", "class_word": "cat", "identifier": "rare"}, words={})
    with pytest.raises(ValueError, match="'zxq' is a word of the tokenizer"):
        concept.renamed("<rex>")
    assert concept.renamed("zxq").token == "zxq"


def test_every_subject_of_a_joint_and_of_a_blended_concept_is_guarded_so(model, tmp_path):
    """What says that a word was learned are its rows: a record of how it was chosen is lost in a blend."""
    rare = concept_of(model, meta={"token": "zxq", "class_word": "cat", "identifier": "rare"}, words={})
    mixed = {"token": "<dog>", "class_word": "cat", "identifier": "learned"}
    joint = concept_of(model, meta=mixed | {"subjects": '[["<dog>", "cat"], ["vfb", "mug"]]'})
    alone = blend([rare], [0.5], model)
    several = blend([rare, joint], [0.5, 0.5])
    several.save(tmp_path / "several.safetensors")
    again = load_concept(tmp_path / "several.safetensors")
    for concept, word in ((alone, "zxq"), (joint, "vfb"), (several, "zxq"), (again, "vfb")):
        with pytest.raises(ValueError, match=f"'{word}' is a word of the tokenizer and not a learned one"):
            concept.renamed("<rex>", of=word)
    assert again.renamed("<rex>", of="<dog>").subjects == [("zxq", "cat"), ("<rex>", "cat"), ("vfb", "mug")]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("<x>,<z>", "'<x>,<z>' holds a comma, and a subject has one word"),
        ("my mug", "holds a space"),
        ("<a>=<b>", "holds an equals sign"),
        ("a\nb", r"holds '\\n'"),
        (" ", "the new word is blank"),
        (
            "<" + "ä" * 200 + ">",
            "the word '<äääääääääääääääääää...' has 402 bytes, too many for the names",
        ),
        ("<cup>", "has the word '<cup>' already; choose another for '<dog>'"),
    ],
)
def test_a_new_word_is_one_word_of_its_own(model, word, says):
    pair = {"subjects": '[["<dog>", "cat"], ["<cup>", "mug"]]'}
    with pytest.raises(ValueError, match=says) as error:
        concept_of(model, meta={"token": "<dog>", "class_word": "cat"} | pair).renamed(word)
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


def test_the_file_names_a_tensor_without_its_other_half(model, tmp_path):
    tensors = {n: t for n, t in residuals(model).items() if not n.endswith("mid_block.attentions.0.proj_out.up")}
    write_safetensors(tmp_path / "c.safetensors", tensors, {"format": "pcs_concept"})
    with pytest.raises(ValueError, match=r"proj_out\.down' has no partner 'unet.*proj_out\.up'"):
        load_concept(tmp_path / "c.safetensors")
    assert read_header(tmp_path / "c.safetensors") == {"format": "pcs_concept"}


def test_a_trained_network_keeps_the_fingerprint_that_it_began_with(model):
    again = load_model("tiny")
    before = fingerprint(again)
    with torch.no_grad():
        for p in again.unet.parameters():
            p += 1
    assert fingerprint(again) == before == fingerprint(model)
    again.release("unet")
    assert fingerprint(again) == before


def test_another_base_is_refused_by_name(model, tmp_path):
    concept = concept_of(model, base="0123456789abcdef:1,2,3")
    concept.meta["base_name"] = "some/other-model"
    concept.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="some/other-model"):
        load_concept(tmp_path / "c.safetensors", model)
    load_concept(tmp_path / "c.safetensors", model, force=True)


def test_a_concept_without_effect_is_refused(model, tmp_path):
    tensors = {n: t * (not n.endswith(".up")) for n, t in residuals(model).items()}
    concept_of(model, tensors=tensors, words={}).save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="changes nothing"):
        load_concept(tmp_path / "c.safetensors", model)


def test_the_same_model_in_another_precision_is_the_same(model):
    half = load_model("tiny", dtype=torch.bfloat16)
    assert same_base(fingerprint(model), fingerprint(half))
    config, _, values = fingerprint(model).partition(":")
    assert not same_base(fingerprint(model), f"{config}:{','.join(['0.5', *values.split(',')[1:]])}")


def test_broken_files_say_what_is_wrong(model, tmp_path):
    path = tmp_path / "c.safetensors"
    concept_of(model).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or corrupt safetensors file"):
        load_concept(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="pickle"):
        load_concept(path)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="pickle"):
        load_concept(path)
    tensors = residuals(model)
    name = next(iter(tensors))
    concept_of(model, tensors=tensors | {name: tensors[name] * float("nan")}).save(path)
    with pytest.raises(ValueError, match="NaN") as error:
        load_concept(path)
    assert name in str(error.value)
    concept_of(model, tensors={"strange.weight": torch.ones(2)}).save(path)
    with pytest.raises(ValueError, match=r"strange\.weight"):
        load_concept(path)
    concept_of(model, tensors={"unet.conv_in.weight": torch.ones(3, 3)}).save(path)
    with pytest.raises(ValueError, match=r"conv_in\.weight"):
        load_concept(path, model)
    with pytest.raises(ValueError, match="not there"):
        load_concept(tmp_path / "none.safetensors")


def test_a_file_that_cannot_be_written_leaves_nothing(model, tmp_path):
    (tmp_path / "folder").write_text("a file where a folder is wanted")
    with pytest.raises(OSError, match="could not be written"):
        concept_of(model).save(tmp_path / "folder" / "c.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["folder"]


def test_learned_words_stand_where_they_are_said(model):
    width = model.text_encoder.get_input_embeddings().weight.shape[1]
    words = {"<dog>": [torch.ones(2, width)], "sksy": [torch.ones(1, width)]}
    text = encode(model, ["a photo of a <dog> cat, sksy", "sksyx <DOG>"], words)
    assert text.places(0, "<dog>") == [5, 6] and text.places(0, "cat") == [7] and text.places(0, "sksy") == [9]
    assert not text.places(1, "sksy") and len(text.places(1, "<dog>")) == 2
    with torch.no_grad():
        red = model.tokenizer.convert_tokens_to_ids("red</w>")
        row = model.text_encoder.get_input_embeddings().weight[[red]].clone()
        torch.testing.assert_close(
            encode(model, ["a red mug"]).states, encode(model, ["a <r> mug"], {"<r>": [row]}).states
        )


GOLDEN = Path(__file__).parent / "golden" / "concept-1.safetensors"  # written by the first release of the format


def test_a_concept_file_of_the_first_version_is_read_bit_for_bit(tmp_path):
    """Every kind of tensor is in it; the values are i, i + 1/4, i + 2/4 ... of the i-th name, every second in bf16."""
    concept = Concept.load(GOLDEN)
    attention, block = "text_model.encoder.layers.0", "mid_block.attentions.0"
    names = [
        *(f"unet.{block}.proj_out.{half}" for half in ("down", "up")),
        *(f"text_encoder.{attention}.self_attn.q_proj.{half}" for half in ("down", "up")),
        *(f"text_encoder_2.{attention}.mlp.fc2.causal_{half}" for half in ("down", "up")),
        *(f"context.{block}.transformer_blocks.0.{half}" for half in ("down", "up")),
        "unet.conv_in.weight",
        "text_encoder.text_model.final_layer_norm.bias",
        "unet.conv_out.bias.diff",
    ]
    assert concept.tensors.keys() == set(names)
    for i, name in enumerate(names):
        shape = (1, 3) if name.endswith("down") else (3, 1) if name.endswith("up") else (2, 2)
        dtype = torch.bfloat16 if i % 2 else torch.float32
        expected = (torch.arange(shape[0] * shape[1]) / 4 + i).reshape(shape).to(dtype)
        assert concept.tensors[name].dtype == dtype and torch.equal(concept.tensors[name], expected), name
    rows = {word: [(tuple(r.shape), set(r.flatten().tolist())) for r in rows] for word, rows in concept.words.items()}
    assert rows == {"<dog>": [((2, 3), {1.5}), ((2, 4), {2.5})], "a.down": [((1, 3), {3.5}), ((1, 4), {4.5})]}
    assert {slot.kind for slot in concept.residuals()} == {Kind.PAIR, Kind.CAUSAL, Kind.CONTEXT}
    assert {slot.kind for slot in concept.changes()} == {Kind.VALUE, Kind.DIFFERENCE}
    assert f"text_encoder_2.{attention}.mlp.fc2.causal" in concept.pairs() and len(concept.pairs()) == 4
    assert (concept.method, concept.base, concept.token) == ("textboost", "0123456789abcdef:1,2,3", "<dog>")
    assert concept.hold_first and concept.subjects == [("<dog>", "dog"), ("a.down", "cat")]
    concept.save(tmp_path / "again.safetensors")
    again = Concept.load(tmp_path / "again.safetensors")
    assert all(torch.equal(again.tensors[n], t) for n, t in concept.tensors.items()) and again.meta == concept.meta
    assert read_header(tmp_path / "again.safetensors") == read_header(GOLDEN)
