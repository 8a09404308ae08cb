"""Any subset trains under any plan with the eager gradients; residuals, maps and masks; where the backward stops."""

from __future__ import annotations

import copy

import pytest
import torch
from pcs_trainer.unet.blocks import Resample
from pcs_trainer.unet.layers import LowRank
from pcs_trainer.unet.plans import PLAN_NAMES, PLANS
from torch.utils._python_dispatch import TorchDispatchMode
from unet_families import FAMILIES, inputs, ours_like, peer, relative

import pcs_kernels

SUBSETS = {
    "everything": lambda name: True,
    "keys and values": lambda name: "attn2.to_k" in name or "attn2.to_v" in name,
    "projections out": lambda name: "proj_out" in name,
    "norms": lambda name: "norm" in name,
    "convolutions": lambda name: "conv" in name,
    "feed-forward": lambda name: "ff.net" in name,
    "attention": lambda name: ".attn" in name,
    "time": lambda name: "time_" in name,
}
MIXED = {"": "A", "down_blocks": "C", "up_blocks.1": "B", "mid_block": "checkpoint"}


@pytest.fixture(scope="module", params=["sd1", "sdxl", "up-scaler"])
def model(request):
    torch.manual_seed(1)
    config = FAMILIES[request.param] | {"layers_per_block": 1}
    return ours_like(peer(config)), inputs(config, batch=1, size=8)


def gradients(unet, call, plan) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The prediction and the gradient of each trained tensor, text states included."""
    x, t, context, added = call
    unet.set_plan(plan).zero_grad()
    text = context.clone().requires_grad_()
    y = unet(x, t, text, added)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    found = {name: p.grad.clone() for name, p in unet.named_parameters() if p.requires_grad}
    return y.detach(), found | {"text": text.grad}


@pytest.mark.slow
@pytest.mark.parametrize("subset", list(SUBSETS))
def test_every_plan_gives_the_eager_gradients(model, subset):
    unet, call = model
    for name, p in unet.named_parameters():
        p.requires_grad_(SUBSETS[subset](name))
    expected, eager = gradients(unet, call, "eager")
    assert len(eager) > 1
    count = len(unet.layers())
    listed = (["A", "C"] * count)[:count]
    for plan in (listed,) if subset == "norms" else (*PLANS[1:], MIXED):
        actual, found = gradients(unet, call, plan)
        assert torch.equal(actual, expected)
        for name, g in found.items():
            assert relative(g, eager[name]) < 1e-6, (plan, name)


def test_a_plan_may_be_given_by_its_long_name_and_is_kept_by_its_short_one(model):
    unet, _ = model
    for short, long in PLAN_NAMES.items():
        for name in (short, long):
            assert {layer.plan for layer in unet.set_plan(name).layers().values()} == {short}
    unet.set_plan({"": "keep_all", "down_blocks": "C", "mid_block": "rebuild_all"})
    assert {name.split(".")[0]: layer.plan for name, layer in unet.layers().items()} == {
        "down_blocks": "C",
        "mid_block": "checkpoint",
        "up_blocks": "eager",
    }
    count = len(unet.layers())
    assert [layer.plan for layer in unet.set_plan(["rebuild_norms"] * count).layers().values()] == ["A"] * count
    unet.set_plan("eager")


def projections(unet) -> list[str]:
    ends = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out")
    return [name for name, _ in unet.named_modules() if name.endswith(ends)]


def attach_everywhere(unet, key="", names=None) -> list[LowRank]:
    made = []
    for name in names or projections(unet):
        c_out, c_in = unet.get_submodule(name).weight.shape[:2]
        down, up = torch.randn(2, c_in) * c_in**-0.5, torch.randn(c_out, 2) * 0.2
        made.append(unet.attach(name, LowRank(down.requires_grad_(), up.requires_grad_(), scale=0.5, key=key)))
    return made


@pytest.mark.slow
def test_residuals_on_every_projection_train_under_every_plan(model):
    unet, (x, t, context, added) = model
    unet.requires_grad_(False)
    plain = unet(x, t, context, added)
    residuals = attach_everywhere(unet, names=projections(unet))
    second = attach_everywhere(unet, names=projections(unet)[:3])
    tensors = [p for r in residuals + second for p in (r.down, r.up)]
    try:
        results = {}
        for plan in PLANS:
            y = unet.set_plan(plan)(x, t, context, added)
            results[plan] = torch.autograd.grad(y.square().sum(), tensors)
        assert relative(y, plain) > 1e-2
        assert min(g.abs().max() for g in results["eager"]) > 0
        for plan in PLANS[1:]:
            for g, expected in zip(results[plan], results["eager"], strict=True):
                assert relative(g, expected) < 1e-6, plan
    finally:
        unet.detach()
    assert torch.equal(unet.set_plan("eager")(x, t, context, added), plain)


def test_a_residual_equals_the_merged_weight(model):
    unet, (x, t, context, added) = model
    unet.requires_grad_(False)
    name = "up_blocks.1.attentions.0.proj_out"
    layer = unet.get_submodule(name)
    (residual,) = attach_everywhere(unet, key="dog", names=[name])
    with torch.no_grad():
        attached = unet(x, t, context, added)
        unet.detach("dog")
        before = layer.weight.clone()
        plain = unet(x, t, context, added)
        layer.weight += (residual.scale * residual.up @ residual.down).reshape(layer.weight.shape)
        merged = unet(x, t, context, added)
        layer.weight.copy_(before)
    assert relative(attached, plain) > 1e-4
    assert relative(attached, merged) < 1e-5


def test_maps_are_what_the_attention_gave_to_the_tokens(model):
    unet, (x, t, context, added) = model
    unet.requires_grad_(False).set_plan("eager")
    capture = torch.zeros(1, 2, context.shape[1])
    capture[0, 0, 2] = 1
    capture[0, 1] = 1
    with torch.no_grad():
        plain = unet(x, t, context, added)
        y, maps = unet(x, t, context, added, capture=capture)
        assert torch.equal(y, plain)
        assert list(maps) == unet.attention_names()
        for m in maps.values():
            assert m.dtype is torch.float32
            torch.testing.assert_close(m[:, 1], torch.ones_like(m[:, 1]))
        chosen = unet.attention_names()[1]
        _, only = unet(x, t, context, added, capture={chosen: capture})
    assert list(only) == [chosen]
    assert torch.equal(only[chosen], maps[chosen])


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_flow_through_the_maps(model, plan):
    unet, (x, t, context, added) = model
    unet = copy.deepcopy(unet).double().requires_grad_(False).set_plan(plan)
    x, context = x.double(), context.double()
    capture = torch.zeros(1, 1, context.shape[1], dtype=torch.float64)
    capture[0, 0, 3] = 1

    def total(text):
        maps = unet(x, t, text, added, capture=capture)[1]
        return sum(m.square().mean() for m in maps.values())

    text = context.clone().requires_grad_()
    (g,) = torch.autograd.grad(total(text), text)
    step = 1e-5 * torch.randn_like(text)
    with torch.no_grad():
        slope = (total(context + step) - total(context - step)) / 2
    assert slope.item() == pytest.approx((g * step).sum().item(), rel=1e-4)


def test_masks_of_the_same_block_gate_its_residuals(model):
    unet, (x, t, context, added) = model
    unet.requires_grad_(False).set_plan("eager")
    names = [n for n in projections(unet) if n.endswith("proj_out")]
    attach_everywhere(unet, key="dog", names=names)
    attach_everywhere(unet, key="cat", names=names)
    capture = torch.ones(1, 1, context.shape[1])
    seen = []

    def look(value):
        def masks(name, maps):
            seen.append((name, maps is not None))
            size = None if maps is None else maps.shape[::2]
            return None if maps is None else {key: torch.full(size, float(v)) for key, v in value.items()}

        return masks

    try:
        with torch.no_grad():
            both, _ = unet(x, t, context, added, capture=capture, masks=look({"dog": 1, "cat": 1}))
            dog, _ = unet(x, t, context, added, capture=capture, masks=look({"dog": 1, "cat": 0}))
            none, _ = unet(x, t, context, added, capture=capture, masks=look({"dog": 0, "cat": 0}))
            open_all = unet(x, t, context, added)
            unet.detach("cat")
            dog_alone = unet(x, t, context, added)
            unet.detach("dog")
            plain = unet(x, t, context, added)
    finally:
        unet.detach()
    assert seen[:2] == [(unet.attention_names()[0], False), (unet.attention_names()[0], True)]
    assert relative(both, open_all) < 1e-6
    assert relative(dog, dog_alone) < 1e-6
    assert relative(none, plain) < 1e-6
    assert relative(dog, both) > 1e-3


def test_a_stack_of_concepts_gives_each_sample_its_own(model):
    unet, (x, t, context, added) = model
    unet.requires_grad_(False)
    name = "up_blocks.1.attentions.0.proj_out"
    c = unet.get_submodule(name).weight.shape[0]
    down, up = torch.randn(2, 3, c) * c**-0.5, torch.randn(2, c, 3)
    twice = {k: v.repeat_interleave(2, 0) for k, v in added.items()}
    try:
        with torch.no_grad():
            alone = []
            for i in (1, 0):
                unet.attach(name, LowRank(down[i], up[i]))
                alone.append(unet(x, t, context, added))
                unet.detach()
            unet.attach(name, LowRank(down, up, index=torch.tensor([1, 0])))
            both = unet(x.repeat(2, 1, 1, 1), t.repeat(2), context.repeat(2, 1, 1), twice)
    finally:
        unet.detach()
    assert relative(both, torch.cat(alone)) < 1e-5


class Products(TorchDispatchMode):
    """Names of the backward products that run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "backward" in str(func):
            self.ran.append(str(func))
        return func(*args, **(kwargs or {}))


def backward_products(unet, x, t, kv, added) -> list[str]:
    y = unet(x, t, kv, added)
    with Products() as products:
        y.sum().backward()
    return products.ran


def test_the_backward_stops_at_the_first_layer_that_needs_it(model):
    unet, (x, t, context, added) = model
    unet.requires_grad_(False).set_plan("A")
    kv = unet.text_kv(context)
    last = unet.conv_norm_out.weight.requires_grad_()
    late = backward_products(unet, x, t, kv, added)
    assert late == ["pcs_kernels.frozen_conv2d_backward.default", "pcs_kernels.group_norm_silu_backward.default"]
    last.requires_grad_(False)
    first = unet.conv_in.weight.requires_grad_()
    assert len(backward_products(unet, x, t, kv, added)) > 10 * len(late)
    first.requires_grad_(False)


def test_the_text_product_is_one_and_costs_no_memory(model):
    unet, (_x, _t, context, _added) = model
    unet.requires_grad_(False)
    unet.text_kv(context)
    weights = [p for name, p in unet.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]
    assert len({p.untyped_storage().data_ptr() for p in weights}) == 1
    with torch.no_grad():
        before = unet.text_kv(context)
        weights[0].mul_(2)
        name = unet.attention_names()[0]
        changed = unet.text_kv(context)
        torch.testing.assert_close(changed[name][0], 2 * before[name][0])
        weights[0].div_(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_upsampling_and_its_convolution_are_one(dtype):
    torch.manual_seed(0)
    resample = Resample(8, 1).to(dtype)
    x = torch.randn(2, 8, 5, 6, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    plain = resample(x, (10, 12))
    gradient = torch.randn_like(plain)
    (expected,) = torch.autograd.grad(plain, x, gradient)
    resample.requires_grad_(False)
    for _ in range(2):
        joined = resample(x, (10, 12))
        assert relative(joined, plain) < torch.finfo(dtype).eps * 4
        assert relative(torch.autograd.grad(joined, x, gradient)[0], expected) < torch.finfo(dtype).eps * 4
        with torch.no_grad():
            resample.conv.weight.mul_(2)  # the kernels made from the weight follow it
            plain, expected = 2 * plain - resample.conv.bias.reshape(-1, 1, 1), 2 * expected


def test_float32_masters_train_in_a_bfloat16_network(model):
    unet, (x, t, context, added) = model
    low = copy.deepcopy(unet).bfloat16().requires_grad_(False)
    for name, p in low.named_parameters():
        if "attn2.to_k" in name or "proj_out" in name:
            p.data = p.data.float()
            p.requires_grad_()
    added = {k: v.bfloat16() if v.is_floating_point() else v for k, v in added.items()}
    y = low.set_plan("A")(x.bfloat16(), t, context.bfloat16(), added)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert all(p.grad.dtype is torch.float32 and p.grad.any() for p in low.parameters() if p.requires_grad)


def test_a_second_backward_through_a_kept_graph(model):
    unet, (x, t, context, added) = model
    unet.requires_grad_(False).set_plan("C")
    text = context.clone().requires_grad_()
    y = unet(x, t, text, added).square().sum()
    first = torch.autograd.grad(y, text, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, text)[0])


def test_a_forced_backend_is_used_by_the_network(model):
    unet, (x, t, context, added) = model
    with torch.no_grad(), pcs_kernels.backend("reference"):
        assert torch.isfinite(unet(x, t, context, added)).all()


def test_bad_calls_are_refused_in_one_sentence(model):
    unet, (x, t, context, added) = model
    with pytest.raises(ValueError, match=r"context must be \[B, T, 24\]"):
        unet(x, t, context[..., :5], added)
    channels = unet.settings["in_channels"]
    with pytest.raises(ValueError, match=rf"x must be \[B, {channels}, H, W\]"):
        unet(x[:, :3], t, context, added)
    names = r"keep_all \(eager\), rebuild_norms \(A\), rebuild_feedforward \(B\), rebuild_around_attention \(C\), "
    names += r"rebuild_all \(checkpoint\)"
    with pytest.raises(ValueError, match=f"'D' is unknown; choose one of {names}"):
        unet.set_plan("D")
    with pytest.raises(ValueError, match="'rebuild-al' is unknown; did you mean 'rebuild_all'"):
        unet.set_plan({"mid_block": "rebuild-al"})
    with pytest.raises(ValueError, match="'nowhere'"):
        unet.set_plan({"nowhere": "A"})
    with pytest.raises(ValueError, match="lists 1 layers"):
        unet.set_plan(["A"])
    with pytest.raises(ValueError, match=r"conv_in is not a projection"):
        unet.attach("conv_in", LowRank(torch.ones(1, 4), torch.ones(32, 1)))
    with pytest.raises(ValueError, match="do not fit"):
        unet.attach("up_blocks.1.attentions.0.proj_out", LowRank(torch.ones(1, 4), torch.ones(32, 1)))
    if unet.add_embedding is not None:
        with pytest.raises(ValueError, match="text_embeds"):
            unet(x, t, context)
