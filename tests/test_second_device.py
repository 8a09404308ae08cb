"""Whole runs on a device that is not the CPU: every method and option, the commands, what is said of devices."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

import numpy as np
import pytest
import torch
from pcs_trainer import load_model, machine
from pcs_trainer.cli import entry as cli
from pcs_trainer.concept.loading import load_concept
from pcs_trainer.methods import method_named
from pcs_trainer.report import run_report
from pcs_trainer.settings import Settings, literal_choices
from pcs_trainer.training.trainer import Trainer
from PIL import Image
from second_device import NAME, SIZE, Second, calls, folder, halved, model, of_cpu, one_thread, twin
from trainer_cases import METHODS, cache, pictures, small_for

import pcs_kernels
from pcs_kernels import diagnostics

__all__ = ["cache", "folder", "halved", "model", "one_thread", "twin"]

RUN = dict(
    resolution=SIZE,
    steps=1,
    batch=1,
    bank=2,
    prior_images=1,
    prior_steps=1,
    learning_rate=1e-2,
    probe_every=0,
    token="<mug>",
)
# Together they reach every option that touches tensors; each goes to the methods that have it.
AFTER = dict(snr_gamma=5.0, timesteps="snr", optimizer="adamw", step_in_backward=False, plan="B", clip_norm=0.1)
COMMAND = "--class mug --steps 1 --batch 1 --resolution 32 --probe-every 0 --no-report --out"
INSIDE = dict(
    step_in_backward=True,
    clip="two_pass",
    clip_norm=0.1,
    prior_weight=1.0,
    plan="C",
    train_token=True,
    train_text_encoder=True,
)


def variants(method):
    """Each value but the default of what a method alone lets choose from; an up-scaler's stage needs another UNet."""
    settings = method_named(method).settings
    common = {field.name for field in fields(Settings)}
    hints = get_type_hints(settings)
    return [
        {field.name: choice} | ({"train_text_encoder": True} if field.name == "text_encoder_form" else {})
        for field in fields(settings)
        if field.name not in common | {"stage"} | INSIDE.keys()
        for choice in literal_choices(hints[field.name]) or ((not field.default,) if hints[field.name] is bool else ())
        if choice not in (field.default, None)
    ]


VARIANTS = [
    pytest.param(method, variant, id=f"{method}-{variant}") for method in METHODS for variant in variants(method)
]


def trainer(model, method, out=None, images=None, **options):
    given = small_for(method, **RUN | options)
    return Trainer(model, method, images or pictures(), class_word="mug", out=out, **given)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A folder of photos with masks beside them."""
    root = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(root / f"{i}.png")
        mask = np.zeros(pixels.shape[:2], np.uint8)
        mask[8:-8, 8:-8] = 255
        Image.fromarray(mask).save(root / f"{i}-mask.png")
    return root


# ---- the device itself


def refused(call, match="same device"):
    with pytest.raises(RuntimeError, match=match):
        call()


def test_the_device_refuses_what_a_gpu_refuses():
    x = torch.randn(3, 4)
    d = x.to(NAME)
    index = torch.tensor([0, 2])
    assert d.device.type == NAME and torch.equal(d.cpu(), x) and type(d.cpu()) is torch.Tensor
    for mixed in (lambda: d + x, lambda: x + d, lambda: d @ x.T, lambda: torch.cat([d, x]), lambda: torch.equal(d, x)):
        refused(mixed)
    refused(lambda: x.add_(d))
    refused(lambda: torch.tensor(1.0).add_(d.sum()))
    refused(lambda: torch.where(d > 0, d, x))
    refused(lambda: x[index.to(NAME)])
    refused(lambda: torch.randn(3, device=NAME, generator=torch.Generator()), "generator")
    with pytest.raises(TypeError, match="float64"):
        d.double()
    with pytest.raises((RuntimeError, TypeError)):
        d.numpy()
    assert torch.equal((d * torch.tensor(2.0)).cpu(), 2 * x) and torch.equal(d[index].cpu(), x[index])
    assert d.tolist() == x.tolist() and float(d.sum()) == float(x.sum())


def test_gradients_on_the_device_are_the_cpus():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 2), torch.randn(3, 4)
    layer(x).square().sum().backward()
    expected = layer.weight.grad
    layer.zero_grad()
    layer.to(NAME)(x.to(NAME)).square().sum().backward()
    assert isinstance(layer.weight.grad, Second) and torch.equal(layer.weight.grad.cpu(), expected)


def test_an_error_in_a_backward_is_raised_after_it():
    x = torch.ones(3, device=NAME, requires_grad=True)
    x.register_hook(lambda g: g + torch.ones(3))
    refused(lambda: (x * 2).sum().backward())


# ---- training


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_goes_on_from_its_checkpoint(model, masked, tmp_path, method):
    """In float32, on masked photos, the optimizer step after the backward; then from the file on, with previews."""
    calls.clear()
    trainer(model, method, tmp_path, masked, **AFTER, check_backend=True).train()
    assert calls, "the product's operations did not run on the device"
    of_cpu(trainer(model, method, tmp_path, masked, **AFTER | dict(steps=2), check_backend=False).train(resume=True))
    of_cpu(load_concept(tmp_path / "concept.safetensors"))


def together(method):
    """Two subjects, or one where the method takes no more."""
    words = ("mug", "cat")[: 1 if method_named(method).one_subject(method_named(method).settings()) else 2]
    return [{"images": pictures(seed=61 + i), "class_word": w, "token": f"<{w}>"} for i, w in enumerate(words)]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_several_subjects_train_in_bfloat16_with_the_step_in_the_backward(halved, method):
    """With class images, a clip of two passes, learned words and, where it can be, the text encoder."""
    settings = small_for(method, **RUN | INSIDE)
    if method == "textual_inversion":  # its word stands in no prompt of the class: it refuses the prior loss
        settings["prior_weight"] = 0.0
    del settings["token"]
    events = []
    run = Trainer(halved, method, concepts=together(method), **settings | dict(batch=2), check_backend=False)
    of_cpu(run.train(on_event=events.append))
    assert [e.kind for e in events if e.kind in ("step", "done")] == ["step", "done"]


@pytest.mark.slow
@pytest.mark.parametrize("method, variant", VARIANTS)
def test_every_variant_of_a_method_trains(model, method, variant):
    of_cpu(trainer(model, method, **variant, check_backend=False).train())


@pytest.mark.slow
@pytest.mark.parametrize("inside", (True, False))
def test_micro_batches_are_one_step(model, inside):
    of_cpu(trainer(model, "custom_diffusion", step_in_backward=inside, accumulate=2, check_backend=False).train())


@pytest.mark.slow
def test_the_probe_and_the_previews_run_on_the_device(model, tmp_path):
    events = []
    options = dict(probe_every=1, preview_every=1, preview_prompts=("a <mug> mug",), check_backend=False)
    trainer(model, "personalized_residuals", tmp_path, **options).train(on_event=events.append)
    assert {"probe", "preview"} <= {e.kind for e in events} and not [str(e) for e in events if e.kind == "warning"]


@pytest.mark.slow
def test_a_run_on_the_device_is_the_run_on_the_cpu(model, twin):
    """By the same operations, in the reference."""
    options = dict(snr_gamma=5.0, steps=2, check_backend=False)
    with pcs_kernels.backend("reference"):
        ours, theirs = (trainer(m, "personalized_residuals", **options).train() for m in (model, twin))
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-4, atol=1e-5)


# ---- what is said of devices


def test_a_device_is_named_and_counted():
    assert machine.device_problem(NAME) is machine.device_problem("cpu") is machine.device_problem("meta") is None
    assert "unknown device 'gpu'; give cpu" in machine.device_problem("gpu")
    assert "there is no second:7 here: PyTorch sees 1" in machine.device_problem(f"{NAME}:7")
    for kind in ("cuda", "xpu", "mps"):
        if not diagnostics.is_there(kind):
            assert f"sees no {'GPU' if kind == 'cuda' else kind}" in machine.device_problem(kind)
            with pytest.raises(ValueError, match=f"device '{kind}': PyTorch sees no"):
                load_model("tiny", device=kind)


@pytest.mark.slow
def test_the_commands_run_on_it_and_say_what_runs(folder, masked, tmp_path, capsys):
    place = ["--model", str(folder), "--device", NAME]
    options = COMMAND.split()
    assert cli.main(["train", str(masked), *options, str(tmp_path), *place]) == 0
    said = capsys.readouterr().err
    assert f"{NAME} is untested" in said and "float32: nobody has measured" in said
    assert f"there are no kernels for {NAME}" in said
    assert (
        cli.main(
            [
                "sample",
                "a {} on a hill",
                "--concept",
                str(tmp_path),
                "--size",
                "32",
                "--out",
                str(tmp_path / "drawn"),
                "--steps",
                "1",
                *place,
            ]
        )
        == 0
    )
    assert cli.main(["train", str(masked), *options, str(tmp_path / "b"), *place, "--budget", "4GB"]) == 2
    assert f"memory is counted for cpu and cuda alone, not for {NAME}" in capsys.readouterr().err
    assert f"no kernels for {NAME}" in run_report.machine(NAME)["kernels"]


def test_the_verdicts_are_what_runs():
    runs = {(v.op, v.backend) for v in diagnostics.verdicts(NAME) if v.runs}
    assert runs == {(op, "sdpa" if op == "self_attention" else "reference") for op in diagnostics.op_names()}
    calls.clear()
    q = torch.randn(1, 2, 9, 8, device=NAME)
    pcs_kernels.self_attention(q, q, q)
    assert not calls  # torch's attention, not an operation of ours
    pcs_kernels.geglu(torch.randn(2, 8, device=NAME))
    assert calls == {"geglu_forward": 1}
