"""Merging, blending and compressing concepts: against a general solver, the paper's sizes, and on the tiny model."""

from __future__ import annotations

import pytest
import torch
from pcs_trainer.concept import merging
from pcs_trainer.concept.attach import attached, predict
from pcs_trainer.concept.blending import blend
from pcs_trainer.concept.captions import general_captions
from pcs_trainer.concept.compression import compress, kept_values
from pcs_trainer.concept.concept import Concept
from pcs_trainer.concept.merging import RIDGE, Constraint, gram, independent_rows, merge
from pcs_trainer.model.fingerprint import fingerprint
from pcs_trainer.model.text import encode
from pcs_trainer.unet.unet import UNet
from unet_families import SD15_REAL, relative

WIDTH, OUT = 24, 40


def random_rows(n: int, seed: int = 0) -> torch.Tensor:
    """Rows of unequal directions, as text states are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -2, WIDTH, dtype=torch.float64)
    return torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) * sizes


def kkt(w0, c, v, creg, ridge):
    """The same problem by its optimality conditions, one linear system with Lagrange multipliers."""
    g = gram(creg, ridge)
    n = len(c)
    system = torch.zeros(WIDTH + n, WIDTH + n, dtype=torch.float64)
    system[:WIDTH, :WIDTH], system[:WIDTH, WIDTH:], system[WIDTH:, :WIDTH] = g, c.T, c
    right = torch.cat([g @ w0.T, v])
    return torch.linalg.solve(system, right)[:WIDTH].T


def objective(w, w0, creg, ridge):
    g = gram(creg, ridge)
    return float(torch.trace((w - w0) @ g @ (w - w0).T))


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-3])
def test_closed_form_is_the_constrained_minimum(ridge):
    w0 = torch.randn(OUT, WIDTH, dtype=torch.float64)
    c, creg, v = random_rows(5, 1), random_rows(300, 2), torch.randn(5, OUT, dtype=torch.float64)
    constraint = Constraint(c, creg, ridge)
    assert constraint.kept == list(range(5))
    w = constraint.solve(w0, v)
    general = kkt(w0, c, v, creg, ridge)
    assert float((c @ w.T - v).abs().max() / v.abs().max()) < 1e-8
    assert objective(w, w0, creg, ridge) <= objective(general, w0, creg, ridge) * (1 + 1e-8)
    assert relative(w, general) < 1e-7
    nudge = torch.randn(OUT, WIDTH, dtype=torch.float64)
    nudge -= (nudge @ c.T) @ torch.linalg.pinv(c.T)  # keeps the constraint
    assert objective(w + 0.01 * nudge, w0, creg, ridge) > objective(w, w0, creg, ridge)


def test_the_constraint_is_kept_with_fewer_captions_than_dimensions():
    w0 = torch.randn(OUT, WIDTH, dtype=torch.float64)
    c, creg, v = random_rows(4, 1), random_rows(WIDTH // 2, 2), torch.randn(4, OUT, dtype=torch.float64)
    w = Constraint(c, creg).solve(w0, v)
    assert float((c @ w.T - v).abs().max() / v.abs().max()) < 1e-8


def test_captions_that_span_nothing_are_one_sentence():
    with pytest.raises(ValueError, match="span too little"):
        Constraint(random_rows(2), torch.zeros(5, WIDTH), ridge=0.0)


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_rows_that_repeat_others_are_dropped(noise):
    w0 = torch.randn(OUT, WIDTH, dtype=torch.float64)
    c, creg = random_rows(3, 1), random_rows(300, 2)
    v = torch.randn(3, OUT, dtype=torch.float64)
    again = c[[1, 2]] * (1 + noise * torch.randn(2, WIDTH, dtype=torch.float64))
    constraint = Constraint(torch.cat([c, again]), creg)
    assert len(constraint.kept) == 3 and sorted(i if i < 3 else i - 2 for i in constraint.kept) == [0, 1, 2]
    w = constraint.solve(w0, torch.cat([v, v[[1, 2]]])[constraint.kept])
    assert float((c @ w.T - v).abs().max() / v.abs().max()) < 1e-6
    assert relative(w, Constraint(c, creg).solve(w0, v)) < 1e-5


def test_a_row_between_two_others_is_dependent():
    c = random_rows(3, 1)
    m = torch.cat([c, (c[:1] + 2 * c[1:2])])
    assert len(independent_rows(m @ m.T)) == 3
    assert independent_rows(c @ c.T) == [0, 1, 2]


def test_nearly_singular_targets_still_meet_the_constraint():
    w0 = torch.randn(OUT, WIDTH, dtype=torch.float64)
    c, creg = random_rows(4, 1), random_rows(300, 2)
    c[3] = c[0] + 3e-4 * c[3]
    v = torch.randn(4, OUT, dtype=torch.float64)
    constraint = Constraint(c, creg)
    assert constraint.kept == [0, 1, 2, 3]
    w = constraint.solve(w0, v)
    assert float((c @ w.T - v).abs().max() / v.abs().max()) < 1e-8


def kv_concept(model, word: str, class_word: str, seed: int, size: float = 0.2) -> Concept:
    """What Custom Diffusion would have learned, at random: every key and value matrix and one word."""
    generator = torch.Generator().manual_seed(seed)
    parameters, tensors = dict(model.unet.named_parameters()), {}
    for block in model.unet.attention_names():
        for layer in ("to_k", "to_v"):
            w0 = parameters[f"{block}.attn2.{layer}.weight"].detach()
            change = torch.randn(w0.shape, generator=generator) * w0.std() * size
            tensors[f"unet.{block}.attn2.{layer}.weight"] = w0 + change
    table = model.text_encoder.get_input_embeddings().weight
    row = table.mean(0, keepdim=True) + torch.randn(1, table.shape[1], generator=generator) * table.std()
    meta = {"token": word, "class_word": class_word, "family": "sd1"}
    return Concept("custom_diffusion", tensors, {word: [row.detach()]}, meta, fingerprint(model))


@pytest.fixture(scope="module")
def two(model):
    return [kv_concept(model, "<one>", "cat", 1), kv_concept(model, "<two>", "mug", 2)]


def test_merged_concept_does_at_its_words_what_each_does(model, two):
    both = merge(two, model)
    assert both.constraint_residual < 1e-8 and both.dropped_rows == 0
    assert float(both.meta["constraint_residual"]) == pytest.approx(both.constraint_residual, rel=1e-2)
    assert set(both.words) == {"<one>", "<two>"} and set(both.tensors) == set(two[0].tensors)
    with torch.no_grad():
        for concept in two:
            text = encode(model, [f"photo of a {concept.token} {concept.class_word}"], concept.words)
            first, last = text.places(0, concept.token)[0], text.ids[0].length(0)
            rows = text.states[0, first:last]
            for name, w in both.tensors.items():
                assert relative(rows @ w.T, rows @ concept.tensors[name].T) < 1e-4


def test_merging_disturbs_general_text_less_than_another_merge_that_keeps_the_subjects(model, two, monkeypatch):
    """The smallest change of the matrices that keeps the same constraint."""
    captions = general_captions(model)
    parameters = dict(model.unet.named_parameters())
    with torch.no_grad():
        text = encode(model, captions)
    states = torch.cat([text.states[i, 1 : text.ids[0].length(i)] for i in range(len(captions))])

    def disturbed(concept):
        names = {n: parameters[n.removeprefix("unet.")] for n in concept.tensors}
        return sum(float((states @ (concept.tensors[n] - w0).T).norm() ** 2) for n, w0 in names.items()) ** 0.5

    both = merge(two, model)
    monkeypatch.setattr(merging, "gram", lambda creg, ridge: torch.eye(creg.shape[1], dtype=torch.float64))
    smallest = merge(two, model)
    assert both.constraint_residual < 1e-8 and smallest.constraint_residual < 1e-8
    assert disturbed(both) < 0.5 * disturbed(smallest)


def test_the_ridge_hardly_moves_general_text_and_knows_the_size_of_g():
    """As a share of the mean of G's diagonal, earlier versions' 0.1 moved captions twice as far as none."""
    creg, c = random_rows(300, 2), random_rows(5, 1)
    w0, v = torch.randn(OUT, WIDTH, dtype=torch.float64), torch.randn(5, OUT, dtype=torch.float64)

    def moved(ridge, scale=1.0):
        w = Constraint(c * scale, creg * scale, ridge).solve(w0, v * scale)
        return float(((w - w0) @ creg.T).norm())

    assert moved(RIDGE) < 1.05 * moved(0.0) and moved(0.1) > 1.5 * moved(0.0)
    assert moved(RIDGE, 100.0) == pytest.approx(moved(RIDGE), rel=1e-6)
    eigenvalues = torch.linalg.eigvalsh(gram(creg, 0.0))
    assert float(torch.linalg.eigvalsh(gram(creg, 0.01))[-1] / eigenvalues[-1]) == pytest.approx(1.01, rel=1e-9)


def test_every_subject_that_was_learned_jointly_is_constrained(model, two):
    """By what its own matrices make of "V* cat" and "photo of a V* cat", not the first subject's alone."""
    one, other = two
    joint = Concept(
        "custom_diffusion",
        one.tensors,
        one.words | {"<also>": [-one.words["<one>"][0]]},
        one.meta | {"subjects": '[["<one>", "cat"], ["<also>", "bird"]]'},
        one.base,
    )
    both = merge([joint, other], model)
    with torch.no_grad():
        for concept, name in ((joint, "<one> cat"), (joint, "<also> bird"), (other, "<two> mug")):
            for prompt in (name, f"photo of a {name}"):
                text = encode(model, [prompt], concept.words)
                rows = text.states[0, text.places(0, name.split()[0])[0] : text.ids[0].length(0)]
                for tensor, w in both.tensors.items():
                    assert relative(rows @ w.T, rows @ concept.tensors[tensor].T) < 1e-4
    assert both.subjects == [("<one>", "cat"), ("<also>", "bird"), ("<two>", "mug")]
    assert both.subject_words == "<one> cat and <also> bird and <two> mug"
    assert both.instance_prompt == "a photo of a <one> cat and a <also> bird and a <two> mug"


def test_the_same_concept_twice_merges_to_what_it_does(model, two):
    again = two[0].renamed("<uno>")
    both = merge([two[0], again], model)
    assert both.dropped_rows == 6  # the same states under another name
    assert both.constraint_residual < 1e-8 and both.dropped_residual < 1e-6
    assert merge([two[0], two[0]], model).subjects == two[0].subjects


def test_merge_takes_captions_and_compressed_concepts(model, two):
    small = [compress(c, model, 0.9) for c in two]
    both = merge(small, model, regularization=["a blue mug on a table", "a painting of a fish"] * 3)
    assert both.constraint_residual < 1e-8
    assert all(n.endswith(".weight") for n in both.tensors)


def test_what_cannot_be_merged_is_said(model, two):
    with pytest.raises(ValueError, match="at least two"):
        merge(two[:1], model)
    with pytest.raises(ValueError, match="both use the word '<one>'"):
        merge([two[0], kv_concept(model, "<one>", "mug", 3)], model)
    other = Concept("x", {"unet.mid_block.attentions.0.proj_out.down": torch.ones(1, 128)}, {}, {"token": "<x>"})
    other.tensors["unet.mid_block.attentions.0.proj_out.up"] = torch.ones(128, 1)
    with pytest.raises(ValueError, match="is not a key or value matrix"):
        merge([two[0], other], model)
    foreign = kv_concept(model, "<two>", "mug", 2)
    foreign.base = "0123456789abcdef:1,2,3"
    with pytest.raises(ValueError, match="was made on"):
        merge([two[0], foreign], model)


def low_rank(model, key: str, seed: int, rank: int) -> Concept:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, p in model.unet.named_parameters():
        if name.endswith(("proj_out.weight", "attn1.to_q.weight", "attn2.to_v.weight")):
            module = f"unet.{name.removesuffix('.weight')}"
            tensors[f"{module}.down"] = torch.randn(rank, p.shape[1], generator=generator) / p.shape[1] ** 0.5
            tensors[f"{module}.up"] = torch.randn(p.shape[0], rank, generator=generator) * 0.3 / rank
    return Concept("personalized_residuals", tensors, {}, {"title": key}, fingerprint(model))


def test_blend_of_residuals_is_both_concepts_at_once(model):
    a, b = low_rank(model, "a", 1, 3), low_rank(model, "b", 2, 5)
    b.tensors = {n: t for n, t in b.tensors.items() if "attn1" not in n}
    one = blend([a, b], [0.75, -0.5])
    assert one.tensors["unet.mid_block.attentions.0.proj_out.down"].shape[0] == 8
    prompt = "a photo of a cat"
    text = encode(model, [prompt]).states
    x = torch.randn(1, 8, 16, 16)
    with torch.no_grad(), attached(model, [a, b], [0.75, -0.5]):
        expected = model.unet(x, torch.tensor([500]), model.unet.text_kv(text))
    with torch.no_grad(), attached(model, [one]):
        actual = model.unet(x, torch.tensor([500]), model.unet.text_kv(text))
    plain = predict(model, [], prompt)
    assert relative(actual, expected) < 1e-5
    assert relative(predict(model, [one], prompt), plain) > 1e-3


def test_blend_of_whole_values(model, two):
    prompt = "a photo of a <one> cat and a <two> mug"
    with pytest.raises(ValueError, match="give the base model"):
        blend(two, [0.5, 0.2])
    for weights, base in (([0.3, 0.7], None), ([0.5, 0.2], model)):
        one = blend(two, weights, base)
        text = encode(model, [prompt], one.words).states
        x = torch.randn(1, 8, 16, 16)
        with torch.no_grad(), attached(model, two, weights):
            expected = model.unet(x, torch.tensor([500]), model.unet.text_kv(text))
        with torch.no_grad(), attached(model, [one]):
            actual = model.unet(x, torch.tensor([500]), model.unet.text_kv(text))
        assert relative(actual, expected) < 1e-5


def test_what_cannot_be_blended_is_said(model):
    a = low_rank(model, "a", 1, 2)
    with pytest.raises(ValueError, match="1 concepts and 2 weights"):
        blend([a], [1, 2])
    causal = Concept("textboost", {"text_encoder.text_model.encoder.layers.0.mlp.fc2.causal_down": torch.ones(1, 384)})
    causal.tensors["text_encoder.text_model.encoder.layers.0.mlp.fc2.causal_up"] = torch.ones(128, 1)
    with pytest.raises(ValueError, match="from that concept's own word on"):
        blend([a, causal], [1, 1])


def test_compress_keeps_the_largest_values_within_the_ratio():
    s = torch.tensor([5.0, 3.0, 1.0, 1.0])
    assert [kept_values(s, r) for r in (0.1, 0.5, 0.79, 0.8, 0.9, 1.0)] == [1, 1, 1, 2, 3, 4]


def test_compress_is_the_best_of_its_rank_and_exact_at_one(model, two):
    whole = compress(two[0], model, 1.0)
    prompt = two[0].instance_prompt
    assert relative(predict(model, [whole], prompt), predict(model, [two[0]], prompt)) < 1e-4
    small = compress(two[0], model, 0.6)
    parameters = dict(model.unet.named_parameters())
    for stem, (down, up) in small.pairs().items():
        change = two[0].tensors[f"{stem}.weight"] - parameters[f"{stem.removeprefix('unet.')}.weight"]
        s = torch.linalg.svdvals(change.double())
        k = len(down)
        assert s[:k].sum() <= 0.6 * s.sum() < s[: k + 1].sum()
        assert float((up.double() @ down.double() - change).norm()) == pytest.approx(float(s[k:].norm()), rel=1e-4)
    assert small.parameters < two[0].parameters


def test_compress_of_a_pair_needs_no_model(model):
    a = low_rank(model, "a", 1, 6)
    same, small = compress(a, ratio=1.0), compress(a, ratio=0.5)
    for stem, (down, up) in a.pairs().items():
        assert relative(same.pairs()[stem][1] @ same.pairs()[stem][0], up @ down) < 1e-5
        assert len(small.pairs()[stem][0]) < 6
    with pytest.raises(ValueError, match=r"ratio = 1\.5"):
        compress(a, ratio=1.5)


def test_compressed_sizes_on_the_real_configuration(tmp_path):
    """The paper's 76.7 MB are 32 whole matrices in float32; its 15 MB are a mean rank of 76 in their place."""
    unet = UNet.from_config(SD15_REAL, device="meta")
    ends = ("attn2.to_k.weight", "attn2.to_v.weight")
    shapes = {n: p.shape for n, p in unet.named_parameters() if n.endswith(ends)}
    assert len(shapes) == 32 and sum(4 * m * c for m, c in shapes.values()) == 76_677_120
    per_rank = sum(4 * (m + c) for m, c in shapes.values())
    assert per_rank * 76 == 15_058_944
    s = torch.ones(127)  # a spectrum that 0.6 of the sum cuts at rank 76
    k = kept_values(s, 0.6)
    frames = {m: torch.linalg.qr(torch.randn(m, len(s)))[0] for m in (320, 640, 768, 1280)}
    tensors = {}
    for name, (m, c) in shapes.items():
        stem = f"unet.{name.removesuffix('.weight')}"
        tensors[f"{stem}.up"], tensors[f"{stem}.down"] = frames[m] * s, frames[c].T
    small = compress(Concept("custom_diffusion", tensors, {}, {}), ratio=0.6)
    assert {len(down) for down, _ in small.pairs().values()} == {k}
    size = small.save(tmp_path / "small.safetensors").stat().st_size
    assert 0 < size - per_rank * k < 20_000
    assert k == 76 and 15.05e6 < size < 15.1e6


def test_general_captions_are_two_hundred_different_ones(model):
    for captions in (general_captions(), general_captions(model)):
        assert len(captions) == len(set(captions)) == 200
        assert all(c and c == c.strip() for c in captions)
