"""Convolutions on a device other than the CPU: no weight, image or gradient is copied into another order of memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pcs_trainer.concept.attach import attached
from pcs_trainer.concept.concept import Concept
from pcs_trainer.distributed import full_value, is_part, shard
from pcs_trainer.model import layout
from pcs_trainer.model.turns import turn
from pcs_trainer.training.losses import picture_losses
from pcs_trainer.unet.layers import replace_data
from second_device import NAME, folder, model, one_thread, twin
from torch.utils._python_dispatch import TorchDispatchMode

import pcs_kernels
from pcs_kernels._layout import image_format
from pcs_kernels.ops.frozen_conv import reference
from tests import needs

__all__ = ["folder", "model", "one_thread", "twin"]
LAST = torch.channels_last
aten = torch.ops.aten


SIDES = ((8, 6), (4, 3))  # of the images in `step`: no shape of an attention's heads


class Copies(TorchDispatchMode):
    """Copies of images into another order of memory, seen or inside a convolution.

    A library's convolution copies its input or weight where one of them is channels-last and the other is not.
    """

    def __init__(self):
        super().__init__()
        self.made, self.slices, self.convolutions = [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func is aten.convolution.default:
            self.convolutions += 1
            for name, t in (("input", args[0]), ("weight", args[1]), ("output", out)):
                if image_format(t) == LAST and not t.is_contiguous(memory_format=LAST):
                    self.slices += 1
                elif not t.is_contiguous(memory_format=LAST):
                    self.made.append(f"a convolution's {name} {tuple(t.shape)} {t.stride()}")
        elif func in (aten.clone.default, aten.copy_.default, aten._to_copy.default):
            t = args[1] if func is aten.copy_.default else args[0]
            if t.dim() == 4 and (t.shape[2:] in SIDES or t.shape[1:3] in SIDES):
                self.made.append(f"{func} of {tuple(t.shape)} {t.stride()}")
        return out


def last(*shape):
    return torch.randn(shape).contiguous(memory_format=LAST)


# kernel, stride, padding, height, width: odd and even sizes, padding up to the kernel's, last rows that are not reached
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 0, 5, 4),
        (1, 2, 0, 6, 5),
        (1, 1, 1, 4, 4),
        (3, 1, 1, 7, 6),
        (3, 2, 1, 8, 7),
        (3, 2, 0, 8, 8),
        (3, 1, 3, 5, 6),
        (5, 3, 2, 14, 11),
        (2, 2, 0, 7, 6),
        (3, 1, 0, 3, 3),
        (4, 3, 4, 9, 10),
    ],
)
@pytest.mark.parametrize("form", (LAST, torch.contiguous_format))
def test_the_transposed_convolution_is_the_gradient(shape, form):
    kernel, stride, padding, height, width = shape
    x = torch.randn(2, 6, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, kernel, kernel, dtype=torch.float64).contiguous(memory_format=form)
    y = F.conv2d(x, weight, None, stride, padding)
    dy = torch.randn_like(y).contiguous(memory_format=form)
    found = reference.transposed(dy, weight, height, width, stride, padding)
    torch.testing.assert_close(found, torch.autograd.grad(y, x, dy)[0])


def test_a_gradient_on_a_device_is_the_gradient_on_the_cpu():
    for kernel, stride, padding in ((3, 1, 1), (3, 2, 1), (1, 1, 0), (3, 1, 3)):
        x, weight, bias = last(2, 6, 7, 8), last(4, 6, kernel, kernel), torch.randn(4)
        results = []
        for device in ("cpu", NAME):
            leaf = x.to(device).detach().requires_grad_()
            y = pcs_kernels.frozen_conv2d(leaf, weight.to(device), bias.to(device), stride, padding)
            y.square().mean().backward()
            results.append((y.detach().cpu(), leaf.grad.cpu()))
        torch.testing.assert_close(*results)


def test_the_format_of_slices_is_that_of_the_whole():
    whole = last(2, 6, 5, 4)
    assert image_format(whole) == image_format(whole[:, :3]) == image_format(whole[:, 3:]) == LAST
    for plain in (whole.contiguous(), whole.contiguous()[:, 1:3], torch.randn(2, 6, 1, 1), torch.randn(2, 1, 5, 4)):
        assert image_format(plain) == torch.contiguous_format


def first_of_joined(dy):
    """The first half of an image's channels, as `torch.cat` gives a gradient back: another order would go on from it
    through all layers before.
    """
    return dy.split(dy.shape[1] // 2, 1)[0]


@pytest.mark.parametrize("backend", needs.CPU_BACKENDS)
def test_the_gradient_of_a_slice_is_channels_last_on_the_cpu(backend):
    dx = torch.ops.pcs_kernels.frozen_conv2d_backward(
        first_of_joined(last(2, 8, 6, 5)), last(4, 4, 3, 3), 6, 5, 1, 1, True, backend
    )
    assert dx.is_contiguous(memory_format=LAST) and not dx.is_contiguous()


@pytest.mark.parametrize("device", ("meta", NAME))
def test_the_gradient_of_a_slice_is_channels_last_on_a_device(device):
    x = last(2, 4, 6, 5).to(device).requires_grad_()
    y = pcs_kernels.frozen_conv2d(x, last(4, 4, 3, 3).to(device))
    y.backward(first_of_joined(last(2, 8, 6, 5).to(device)))
    assert x.grad.is_contiguous(memory_format=LAST) and not x.grad.is_contiguous()


def saved(call):
    """Every tensor that the backward of a call keeps."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept


@pytest.mark.parametrize("device", ("meta", NAME))
def test_nothing_but_the_weight_is_kept(device):
    x, image = torch.randn(2, 5, 8).to(device).requires_grad_(), last(2, 8, 5, 4).to(device).requires_grad_()
    turned = x.detach().mT.contiguous().mT.requires_grad_()
    matrix, kernel = torch.nn.Linear(8, 6).to(device).requires_grad_(False), last(6, 8, 3, 3).to(device)
    calls = {
        "linear": (lambda: pcs_kernels.frozen_linear(x, matrix.weight, matrix.bias), matrix.weight),
        "linear without bias": (lambda: pcs_kernels.frozen_linear(x, matrix.weight), matrix.weight),
        "linear of turned tokens": (
            lambda: pcs_kernels.frozen_linear(turned, matrix.weight),
            matrix.weight,
        ),
        "conv": (lambda: pcs_kernels.frozen_conv2d(image, kernel), kernel),
    }
    for name, (call, weight) in calls.items():
        kept = saved(call)
        assert kept, name
        own = weight.untyped_storage()._cdata
        assert {t.untyped_storage()._cdata for t in kept} == {own}, name
        with torch.no_grad():
            assert not saved(call), name


@pytest.mark.parametrize("device", ("meta", NAME))
def test_a_wrong_call_is_told_as_on_the_cpu(device):
    x, image = torch.randn(2, 8), torch.randn(1, 8, 5, 4)
    weight, kernel = torch.randn(6, 8), torch.randn(6, 8, 3, 3)
    wrong = [
        lambda to: pcs_kernels.frozen_linear(to(x), to(weight).requires_grad_()),
        lambda to: pcs_kernels.frozen_linear(to(x), to(weight)[:, :5]),
        lambda to: pcs_kernels.frozen_linear(to(x), to(weight).half()),
        lambda to: pcs_kernels.frozen_linear(to(x), to(weight), to(x)[0]),
        lambda to: pcs_kernels.frozen_linear(to(x)[:0], to(weight)),
        lambda to: pcs_kernels.frozen_conv2d(to(image), to(kernel), to(x)[0, :6].requires_grad_()),
        lambda to: pcs_kernels.frozen_conv2d(to(image), to(kernel)[:, :5]),
        lambda to: pcs_kernels.frozen_conv2d(to(image), to(kernel), None, 0),
        lambda to: pcs_kernels.frozen_conv2d(to(image), to(kernel), None, 1, 4),
        lambda to: pcs_kernels.frozen_conv2d(to(image), to(kernel), None, 1.5),
        lambda to: pcs_kernels.frozen_conv2d(to(image)[..., :1], to(kernel), None, 1, 0),
    ]
    for number, call in enumerate(wrong):
        said = []
        for place in ("cpu", device):
            with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
                call(lambda t, place=place: t.detach().to(place))
            said.append((error.type, str(error.value)))
        assert said[0] == said[1], number
    mixed = [lambda: pcs_kernels.frozen_linear(x.to(device), weight)]
    mixed.append(lambda: pcs_kernels.frozen_conv2d(image.to(device), kernel))
    for call in mixed:
        with pytest.raises(ValueError, match="weight is on cpu but x is on"):
            call()


def test_autocast_changes_nothing_on_a_device():
    x, image = torch.randn(2, 8).to(NAME).requires_grad_(), last(1, 8, 5, 4).to(NAME).requires_grad_()
    matrix, kernel = torch.randn(6, 8).to(NAME), last(6, 8, 3, 3).to(NAME)
    with torch.autocast("cpu", torch.bfloat16):
        for leaf, y in ((x, pcs_kernels.frozen_linear(x, matrix)), (image, pcs_kernels.frozen_conv2d(image, kernel))):
            y.sum().backward()
            assert y.dtype == leaf.grad.dtype == torch.float32


# ---- a network


def four_dimensional(unet):
    return {name: p for name, p in unet.named_parameters() if p.dim() == 4}


def test_weights_are_laid_out_where_a_library_reads_them_so(model, twin, monkeypatch):
    assert all(layout.reads_channels_last(kind) for kind in ("cuda", "cuda:1", "xpu", NAME))
    assert not any(layout.reads_channels_last(kind) for kind in ("cpu", "mps", "meta"))
    there, here = four_dimensional(model.unet), four_dimensional(twin.unet)
    for name, p in there.items():
        spatial = p.shape[2] > 1
        assert p.is_contiguous(memory_format=LAST) and p.is_contiguous() == (not spatial), name
        assert here[name].is_contiguous() and torch.equal(p.cpu(), here[name]), name
    assert any(p.shape[2] == 1 for p in there.values()) and any(p.shape[2] == 3 for p in there.values())
    assert all(p.is_contiguous(memory_format=LAST) for p in four_dimensional(model.vae).values())
    monkeypatch.setattr(torch.version, "hip", "6.4")  # MIOpen computes in NCHW
    assert not layout.reads_channels_last("cuda")


def test_one_weight_at_a_time_is_copied(model):
    """Never the whole network beside itself: each copy takes the place of its weight before the next is made."""
    network = torch.nn.ModuleList(torch.nn.Conv2d(8, 8, 3) for _ in range(4)).to(NAME)
    left = []

    class Clones(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is aten.clone.default:
                left.append(sum(layer.weight.is_contiguous() for layer in network))
            return func(*args, **kwargs or {})

    with Clones():
        layout.lay_out(network, NAME)
    assert left == [4, 3, 2, 1]
    with Clones():
        layout.lay_out(network, NAME)
        layout.lay_out(model.unet, NAME)
    assert len(left) == 4  # once is enough


def channels_last(unet):
    """Whether every spatial convolution's weight is."""
    return all(p.is_contiguous(memory_format=LAST) for p in four_dimensional(unet).values())


def test_the_order_stays_when_weights_come_and_go(model, twin):
    """Set aside for the autoencoder, replaced by a concept's and put back, released and read again."""
    before = {name: p.cpu() for name, p in model.unet.named_parameters()}
    with torch.no_grad(), turn(model, "vae", alone=True):
        pass
    assert channels_last(model.unet)
    name = next(n for n, p in four_dimensional(model.unet).items() if p.shape[2] == 3)
    changed = before[name].contiguous() + 1
    tensors = {f"unet.{name}": changed}
    concept = Concept("dreambooth", tensors)
    with attached(model, [concept]):
        assert channels_last(model.unet)
        assert torch.equal(model.unet.get_parameter(name).cpu(), changed)
    with attached(model, [concept], [0.5]):
        assert channels_last(model.unet)
    assert channels_last(model.unet)
    model.release("unet")
    assert channels_last(model.unet)
    assert all(torch.equal(p.cpu(), before[n]) for n, p in model.unet.named_parameters())


def step(model, plan):
    """Forward and backward of a prediction for a loss, as training does."""
    unet = model.unet.set_plan(plan)
    x = last(2, unet.settings["in_channels"], *SIDES[0]).to(NAME)
    text = torch.randn(2, 7, unet.settings["cross_attention_dim"]).to(NAME).requires_grad_()
    target = torch.randn(2, unet.settings["out_channels"], *SIDES[0]).to(NAME)
    with Copies() as copies:
        prediction = unet(x, torch.tensor([5]), text)
    loss = picture_losses(prediction, target).mean()
    with copies:
        loss.backward()
    assert bool(text.grad.cpu().isfinite().all())
    return copies


@pytest.mark.parametrize("plan", ("eager", "B", "C", "checkpoint"))
def test_a_step_copies_nothing_into_another_order(model, plan):
    copies = step(model, plan)
    assert copies.convolutions > 40
    assert len(copies.made) <= 1 and all("(2, 8, 8, 6)" in c for c in copies.made)  # the loss's gradient, of latents
    # `torch.cat` gives its gradients as slices, which a library's convolution copies in the order that they have
    assert copies.slices <= 6


def test_a_plain_weight_is_found_by_that_count(model):
    weight = model.unet.conv_out.weight
    value = weight.data
    try:
        replace_data(weight, value.contiguous())
        assert any("weight" in c for c in step(model, "eager").made)
    finally:
        replace_data(weight, value)


def test_several_processes_share_channels_last_weights(tmp_path):
    """FSDP2 refuses parameters in any order but the plain one."""
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 1)).to(memory_format=LAST)
    network.text_kv = network.forward  # of a UNet's methods, the one that runs apart from `forward`
    values = {name: p.detach().clone() for name, p in network.named_parameters()}
    meeting = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        parts = shard(network, {f"unet.{name}": p for name, p in network.named_parameters()})
        for name, value in values.items():
            assert is_part(parts[f"unet.{name}"]) and torch.equal(full_value(parts[f"unet.{name}"]), value)
    finally:
        torch.distributed.destroy_process_group()
