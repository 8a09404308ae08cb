"""LAG against a slow implementation of its own; masks of ones and zeros; several concepts; maps to look at."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_no_worse_than
from pcs_trainer import load_model
from pcs_trainer.concept.concept import Concept
from pcs_trainer.sampling.drawing import sample
from pcs_trainer.sampling.lag import Lag, Masker, binary, masked_blocks, normalised
from pcs_trainer.sampling.maps import Maps, MapTaker, level_size
from pcs_trainer.unet.layers import LowRank
from test_sampling import Counted, latents_of, made_up_concept
from torch import nn
from unet_families import FAMILIES, inputs, ours_like, peer, peer_prediction, relative

import pcs_kernels

WORDS = {"dog": [2, 3], "cat": [5]}  # the places of each concept's words


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Materialised:
    """A processor for diffusers' attention that writes the probabilities out and keeps their sums over the words."""

    def __init__(self, seen: dict) -> None:
        self.seen = seen

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        def split(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q = split(attn.to_q(hidden_states))
        k, v = split(attn.to_k(encoder_hidden_states)), split(attn.to_v(encoder_hidden_states))
        p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        self.seen["p"] = p.mean(1)  # [B, N, T]
        return attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))


class Blend(nn.Module):
    """Two whole projections, the old weight's and the new one's, blended by the map of the attention before it."""

    def __init__(self, base: nn.Module, pairs: dict, seen: dict, uncond: str, soft: bool) -> None:
        super().__init__()
        self.base, self.seen, self.uncond, self.soft = base, seen, uncond, soft
        self.news = nn.ModuleDict()
        for key, (down, up) in pairs.items():
            self.news[key] = copy.deepcopy(base)
            with torch.no_grad():
                self.news[key].weight += (up.to(base.weight) @ down.to(base.weight)).reshape(base.weight.shape)

    def mask(self, key: str) -> torch.Tensor:
        p = self.seen["p"]
        rows = []
        for row in p[len(p) // 2 :, :, WORDS[key]].sum(-1):
            ordered = row.sort().values
            cut = ordered[(len(row) - 1) // 2]
            rows.append((row - row.min()) / (row.max() - row.min()) if self.soft else (row > cut).to(row))
        given = torch.stack(rows)
        without = {"reuse": given, "zero": 0 * given, "one": 0 * given + 1}[self.uncond]
        return torch.cat([without, given])

    def forward(self, x):
        old = self.base(x)
        y = old
        for key, new in self.news.items():
            m = self.mask(key)
            m = m.reshape(len(x), 1, *x.shape[2:]) if x.dim() == 4 else m[..., None]
            y = y + ((1 - m) * old + m * new(x) - old)
        return y


def slow(network, pairs: dict, uncond: str = "reuse", soft: bool = False):
    """diffusers' network with LAG put into it the long way; pairs: concept -> projection -> (down, up)."""
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if not type(module).__name__.startswith("Transformer2DModel"):
            continue
        seen: dict = {}
        for block in module.transformer_blocks:
            block.attn2.set_processor(Materialised(seen))
        own = {key: of[f"{name}.proj_out"] for key, of in pairs.items()}
        module.proj_out = Blend(module.proj_out, own, seen, uncond, soft)
    return network


def random_pairs(unet, seed: int, rank: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, module in unet.named_modules():
        if name.endswith("proj_out"):
            c_out, c_in = module.weight.shape[:2]
            down = torch.randn(rank, c_in, generator=generator) * c_in**-0.5
            pairs[name] = down, torch.randn(c_out, rank, generator=generator) * 0.3
    return pairs


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def model(request):
    """diffusers' network, ours on its weights, and the inputs of a batch of two without prompt and two with it."""
    torch.manual_seed(2)
    network = peer(FAMILIES[request.param] | {"layers_per_block": 1}).requires_grad_(False)
    x, t, context, added = inputs(FAMILIES[request.param], batch=4, size=12)
    return network, ours_like(network).requires_grad_(False), (x, t, context, added)


def doubled(call):
    x, t, context, added = call
    return x.double(), t, context.double(), {k: v.double() if v.is_floating_point() else v for k, v in added.items()}


def lag_prediction(unet, call, pairs: dict, lag: Lag) -> torch.Tensor:
    """Ours: residuals attached, words captured, masked in the same forward."""
    x, t, context, added = call
    for key, of in pairs.items():
        for name, (down, up) in of.items():
            unet.attach(name, LowRank(down, up, key=key))
    capture = torch.zeros(len(x), len(pairs), context.shape[1])
    for g, key in enumerate(pairs):
        capture[len(x) // 2 :, g, WORDS[key]] = 1
    try:
        blocks = masked_blocks(unet, list(pairs))
        masker = Masker(lag, list(pairs), guided=True)
        return unet(x, t, context, added, capture=dict.fromkeys(blocks, capture), masks=masker)[0]
    finally:
        unet.detach()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"uncond": "zero"}, {"uncond": "one"}, {"soft": True}])
@pytest.mark.parametrize("keys", [["dog"], ["dog", "cat"]])
@torch.no_grad()
def test_lag_is_what_the_slow_implementation_says(model, keys, options):
    network, unet, call = model
    pairs = {key: random_pairs(unet, i, rank=2 + i) for i, key in enumerate(keys)}
    long_way = slow(network, pairs, **options)
    low = peer_prediction(long_way, *call)
    exact = peer_prediction(long_way.double(), *doubled(call))
    actual = lag_prediction(unet, call, pairs, Lag(**options))
    assert_no_worse_than(actual, exact, low, "prediction with LAG")
    assert relative(unet(*call), exact) > 1e-3
    for other in ({}, {"uncond": "zero"}, {"uncond": "one"}, {"soft": True}):
        if other != options:
            assert relative(lag_prediction(unet, call, pairs, Lag(**other)), exact) > 1e-4


def with_masks(unet, call, pairs, value: float, key: str = "dog"):
    for name, (down, up) in pairs.items():
        unet.attach(name, LowRank(down, up, key=key))
    x, t, context, added = call
    capture = torch.ones(len(x), 1, context.shape[1])

    def masks(name, maps):
        return None if maps is None else {key: torch.full_like(maps[:, 0], value)}

    try:
        return unet(x, t, context, added, capture=capture, masks=masks)[0]
    finally:
        unet.detach()


@torch.no_grad()
def test_a_mask_of_ones_is_the_merged_weight(model):
    network, unet, call = model
    pairs = random_pairs(unet, 0, rank=3)
    merged = copy.deepcopy(network).double()
    for name, (down, up) in pairs.items():
        weight = merged.get_submodule(name).weight
        weight += (up.double() @ down.double()).reshape(weight.shape)
    exact = peer_prediction(merged, *doubled(call))
    low = peer_prediction(merged.float(), *call)
    assert_no_worse_than(with_masks(unet, call, pairs, 1.0), exact, low, "prediction with a mask of ones")


@torch.no_grad()
def test_a_mask_of_zeros_is_the_base_bit_for_bit(model):
    """A residual that nothing is left of is not computed, so the layer is the base's own, on every backend."""
    _, unet, call = model
    pairs = random_pairs(unet, 0, rank=3)
    base = unet(*call)
    assert torch.equal(with_masks(unet, call, pairs, 0.0), base)
    assert not torch.equal(with_masks(unet, call, pairs, 1.0), base)
    with pcs_kernels.backend("reference"):
        assert torch.equal(with_masks(unet, call, pairs, 0.0), unet(*call))


def test_a_map_is_cut_at_its_median_and_ties_are_outside():
    maps = torch.tensor([[[1.0, 2, 3, 4], [5, 5, 5, 5], [0, 1, 1, 2]], [[0, 0, 0, 1], [4, 3, 2, 1], [1, 1, 0, 0]]])
    expected = [[[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]], [[0, 0, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0]]]
    assert binary(maps).tolist() == expected
    shares = torch.tensor([[0, 1 / 3, 2 / 3, 1], [0, 0, 0, 0], [0, 0.5, 0.5, 1]])
    torch.testing.assert_close(normalised(maps)[0], shares)
    odd = torch.rand(3, 4, 25)
    assert binary(odd).sum(-1).eq(12).all()


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", dtype=torch.float32)


def test_lag_evaluates_the_network_as_often_as_plain_sampling(tiny):
    concept = made_up_concept(tiny, "<one>", 1)
    for lag in (False, True, Lag(uncond="zero", soft=True)):
        with Counted(tiny.unet) as rows:
            sample(tiny, "a <one> dog on the beach", concept, steps=4, lag=lag, return_maps=lag is True)
        assert rows == [2] * 4


@pytest.mark.slow
def test_lag_lies_between_the_base_and_the_whole_concept(tiny):
    concept = made_up_concept(tiny, "<one>", 1)
    prompt = "a photo of a <one> dog"
    base = latents_of(tiny, prompt, made_up_concept(tiny, "<one>", 1), strengths=[0.0])
    whole, lag = latents_of(tiny, prompt, concept), latents_of(tiny, prompt, concept, lag=True)
    assert relative(lag, base) > 0.01
    assert relative(lag, whole) > 0.01
    assert torch.equal(lag, latents_of(tiny, prompt, concept, lag=Lag()))
    named = latents_of(tiny, prompt, concept, lag=Lag(tokens=["<one>", "dog"]))
    assert torch.equal(named, lag)
    for tokens in (["dog"], "dog", {"<one>": ["dog"]}):
        assert torch.equal(
            latents_of(tiny, prompt, concept, lag=Lag(tokens=tokens)),
            latents_of(tiny, prompt, concept, lag=Lag(tokens=["dog"])),
        )
    assert relative(latents_of(tiny, prompt, concept, lag=Lag(tokens="dog")), lag) > 1e-4


def test_start_and_stop_are_fractions_of_the_steps(tiny):
    concept = made_up_concept(tiny, "<one>", 1)

    def trajectory(**options):
        seen = []
        sample(tiny, "a <one> dog", concept, steps=4, on_step=lambda _s, _n, x: seen.append(x.clone()), **options)
        return seen

    plain, late, early = trajectory(), trajectory(lag=Lag(start=0.5)), trajectory(lag=Lag(stop=0.5))
    always = trajectory(lag=True)
    assert [torch.equal(a, b) for a, b in zip(plain, late)] == [True, True, False, False]
    assert [torch.equal(a, b) for a, b in zip(always, early)] == [True, True, False, False]


def test_several_concepts_have_words_and_masks_of_their_own(tiny):
    one, two = made_up_concept(tiny, "<one>", 1), made_up_concept(tiny, "<two>", 2)
    prompt = "a <one> dog beside a <two> dog"
    both = latents_of(tiny, prompt, [one, two], lag=True)
    only = {"<one>": ["<one>"], "<two>": ["<two>"]}
    apart = latents_of(tiny, prompt, [one, two], lag=Lag(tokens=only))
    swapped = latents_of(tiny, prompt, [one, two], lag=Lag(tokens={"<one>": ["<two>"], "<two>": ["<one>"]}))
    again = latents_of(tiny, prompt, [two, one], lag=Lag(tokens=only))
    assert relative(apart, both) > 1e-3
    assert relative(swapped, apart) > 1e-3
    assert relative(again, apart) < 1e-4


@pytest.mark.slow
def test_each_subject_of_one_concept_has_a_mask(tiny):
    """Where any of them acts, the concept does; a subject that the prompt does not name masks nothing."""
    concept = made_up_concept(tiny, "<one>", 1)
    concept.words["<two>"] = made_up_concept(tiny, "<two>", 2).words["<two>"]
    joint = replace(concept, meta=concept.meta | {"subjects": '[["<one>", "dog"], ["<two>", "dog"]]'})

    def masked(prompt, lag=True, who=joint):
        return latents_of(tiny, prompt, who, lag=lag)

    assert torch.equal(masked("a <two> dog"), masked("a <two> dog", Lag(tokens=["<two>", "dog"])))
    assert torch.equal(masked("a <one> dog"), masked("a <one> dog", who=concept))
    both = "a <one> dog beside a <two> dog"
    assert relative(masked(both), masked(both, Lag(tokens=["<one>", "dog"]))) > 1e-3
    assert torch.equal(masked("a dog"), masked("a dog", Lag(tokens="dog")))
    batch = latents_of(tiny, [both, "a <two> dog"], joint, lag=True)
    assert relative(batch[:1], masked(both)) < 1e-4


def test_masks_of_one_concept_are_joined():
    maps = torch.tensor([[[1.0, 2, 3, 4], [4, 3, 2, 1], [0, 0, 0, 0]]])
    by_key = Masker(Lag(), ["a", "a", "b"], guided=False)("block", maps)
    assert by_key["a"].tolist() == [[1, 1, 1, 1]] and by_key["b"].tolist() == [[0, 0, 0, 0]]
    assert Masker(Lag(), [None, None], guided=False)("block", maps[:, ::2]).tolist() == [[0, 0, 1, 1]]


def test_a_prompt_of_a_batch_without_the_words_is_named(tiny):
    """Its masks would be zeros, and its image the base model's."""
    concept = made_up_concept(tiny, "<one>", 1)
    with pytest.raises(ValueError, match="the prompt 'a cup' has none of them"):
        sample(tiny, ["a <one> dog", "a cup"], concept, steps=1, lag=True)
    with pytest.raises(ValueError, match="the prompt 'a cup' has none of them"):
        sample(tiny, ["a <one> dog", "a cup"], concept, steps=1, lag=True, index=[0, 0])
    sample(tiny, ["a <one> dog", "a cup"], concept, steps=1, lag=True, index=[0, None])


def test_projections_after_the_map_are_masked_and_the_others_named(tiny):
    concept = made_up_concept(tiny, "<one>", 1, only="ff.net.2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = latents_of(tiny, "a <one> dog", concept, lag=True)
    assert relative(after, latents_of(tiny, "a <one> dog", concept)) > 1e-3
    concept.tensors |= made_up_concept(tiny, "<one>", 1, only="attn2.to_v").tensors
    with pytest.warns(UserWarning, match=r"LAG leaves .*attn2\.to_v and \d+ more of the concept '<one>' unmasked"):
        latents_of(tiny, "a <one> dog", concept, lag=True)


def test_what_lag_cannot_do_is_said_in_one_sentence(tiny):
    early = made_up_concept(tiny, "<one>", 1, only="attn2.to_k")
    concept = made_up_concept(tiny, "<one>", 1)
    for concepts, prompt, lag, sentence in (
        ([early], "a <one> dog", True, "the concept '<one>' has none: sample without LAG"),
        ([Concept("x", {}, {}, {"token": "dog"})], "a dog", True, "the concept 'dog' has none: sample without LAG"),
        ([concept], "a cup", True, r"the words of the concept '<one>' \('<one>', 'dog'\), and no prompt has one"),
        ([concept], "a <one> dog", Lag(tokens=["cup"]), r"\('cup'\), and no prompt has one"),
        ([concept], "a <one> dog", Lag(tokens={"<two>": ["dog"]}), "names '<two>'; the concepts here are '<one>'"),
        ([], "a dog", True, r"nothing: give Lag\(tokens"),
        ([], "a dog", Lag(tokens=["dog"]), "the model has none: sample without LAG"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sample(tiny, prompt, concepts, steps=1, lag=lag)
    with pytest.raises(ValueError, match="choose one of reuse, zero, one"):
        Lag(uncond="half")
    with pytest.raises(ValueError, match="0 <= start < stop <= 1"):
        Lag(start=0.6, stop=0.5)


def test_residuals_on_the_network_alone_are_masked_too(tiny):
    """As a trainer draws while it trains: residuals and words, but no concept yet."""
    concept = made_up_concept(tiny, "<one>", 1)
    whole = latents_of(tiny, "a <one> dog", concept, lag=Lag(tokens="<one>"))
    try:
        for name, (down, up) in concept.pairs().items():
            tiny.unet.attach(name.removeprefix("unet."), LowRank(down, up, key="learning"))
        assert relative(latents_of(tiny, "a <one> dog", words=concept.words, lag=True), whole) < 1e-6
    finally:
        tiny.unet.detach()


def test_maps_are_the_mean_over_layers_and_steps(tiny):
    concept = made_up_concept(tiny, "<one>", 1)
    prompts = ["a <one> dog on the beach", "a dog"]
    images, maps = sample(tiny, prompts, concept, steps=3, return_maps=True)
    assert (len(images), maps.tokens) == (2, ["<one>", "dog"])
    assert tuple(maps.mean.shape) == (2, 2, 16, 16)
    assert (tuple(maps.steps.shape), maps.steps.dtype) == ((3, 2, 2, 16, 16), torch.float16)
    assert maps.mean[1, 0].eq(0).all() and maps.mean[0].min() > 0
    torch.testing.assert_close(maps.steps.float().mean(0), maps.mean, rtol=2e-3, atol=1e-4)
    with_lag = sample(tiny, prompts, concept, steps=3, return_maps=["beach"], lag=True)[1]
    assert with_lag.tokens == ["beach"] and with_lag.mean[0].max() > 0
    assert [level_size((16, 16), n) for n in (256, 64, 16)] == [(16, 16), (8, 8), (4, 4)]
    assert level_size((9, 7), 20) == (5, 4)


def test_a_step_of_maps_is_the_mean_of_its_layers_at_the_latents_size():
    sizes = {"a": (9, 7), "b": (5, 4), "c": (5, 4), "d": (3, 2)}
    found = {name: torch.rand(4, 3, h * w) for name, (h, w) in sizes.items()}
    taker = MapTaker(["x", "y"], first=1, size=(9, 7))
    taker.take(found, pictures=2)
    taker.take({name: 0 * m for name, m in found.items()}, pictures=2)
    layers = []
    for name, size in sizes.items():
        image = found[name][2:, 1:].unflatten(-1, size)
        layers.append(F.interpolate(image, size=(9, 7), mode="bilinear", align_corners=False))
    expected = torch.stack(layers).mean(0)
    maps = taker.maps()
    torch.testing.assert_close(maps.mean, expected / 2)
    torch.testing.assert_close(maps.steps[0].float(), expected, rtol=1e-3, atol=1e-3)
    both = Maps.joined([maps, maps])
    assert tuple(both.mean.shape) == (4, 2, 9, 7) and tuple(both.steps.shape) == (2, 4, 2, 9, 7)
