"""Networks that take turns on a device, on one that is not the CPU: what is there when, and that nothing changes."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from pcs_trainer import load_concept, load_model, sample
from pcs_trainer.memory.planner import plan
from pcs_trainer.memory.whole_run import plan_run
from pcs_trainer.model import turns
from pcs_trainer.training.trainer import Trainer
from pcs_trainer.unet.layers import replace_data
from second_device import NAME, calls, folder, model, one_thread, twin
from trainer_cases import cache, pictures, small_for

__all__ = ["cache", "calls", "folder", "model", "one_thread", "twin"]

PARTS = ("unet", "text_encoders", "vae")
RUN = dict(steps=2, batch=1, prior_images=2, prior_steps=2, bank=6, rank=2, learning_rate=1e-2, probe_every=0)


def place(m, part):
    """Where a network is; None where it is not loaded."""
    if part not in m.loaded:
        return None
    network = getattr(m, part)
    network = network if isinstance(network, list) else [network]
    if not any(p.numel() for one in network for p in one.parameters()):
        return "cpu"  # a UNet that waits is empty
    # this test's device cannot be exchanged under a parameter that trains, as the CPU can be for a GPU
    found = {p.device.type for one in network for p in one.parameters() if not p.requires_grad} or {NAME}
    assert len(found) == 1
    return found.pop()


@contextmanager
def watched(m, seen):
    """Which networks are on the device whenever one of them computes."""
    modules = [("unet", m.unet), ("vae", m.vae), *(("text_encoders", e) for e in m.text_encoders)]

    def note(name):
        return lambda *_: seen.append((name, tuple(p for p in PARTS if place(m, p) == NAME)))

    def decoding(*_):
        seen.append(("vae", tuple(p for p in PARTS if place(m, p) == NAME)))

    handles = [x.register_forward_pre_hook(note(name)) for name, x in modules if name != "vae"]
    handles += [m.vae.decoder.register_forward_pre_hook(decoding), m.vae.encoder.register_forward_pre_hook(decoding)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_one_network_at_a_time_draws_the_same(folder):
    own = load_model(folder, torch.float32, device=NAME)
    wanted = sample(own, ["a red mug", "a blue cup"], steps=2, batch=1)
    assert {place(own, p) for p in PARTS} == {NAME}
    own.offload()
    assert [place(own, p) for p in PARTS] == [NAME, "cpu", "cpu"]
    seen = []
    with watched(own, seen):
        found = sample(own, ["a red mug", "a blue cup"], steps=2, batch=1)
    assert {name for name, _ in seen} == set(PARTS) and all(there == (name,) for name, there in seen)
    assert [a.tobytes() for a in found] == [b.tobytes() for b in wanted]
    own.release("text_encoders", "vae")
    assert own.text_encoder is not None and [place(own, p) for p in PARTS] == [NAME, "cpu", None]
    own.offload(False)
    assert place(own, "text_encoders") == NAME
    again = sample(own, ["a red mug", "a blue cup"], steps=2, batch=1)
    assert [a.tobytes() for a in again] == [b.tobytes() for b in wanted]


def test_frozen_values_go_back_to_where_they_were(folder):
    own = load_model(folder, torch.float32, device=NAME)
    own.offload()
    sample(own, "a mug", steps=1)
    before = {n: p.data_ptr() for n, p in own.text_encoder.named_parameters()}
    sample(own, "a mug", steps=1)
    assert {n: p.data_ptr() for n, p in own.text_encoder.named_parameters()} == before


def test_what_has_changed_on_the_device_is_not_lost(folder):
    own = load_model(folder, torch.float32, device=NAME)
    own.offload()
    sample(own, "a mug", steps=1)
    with torch.no_grad():
        own.unet.conv_in.weight.add_(1.0)
    value = own.unet.conv_in.weight.cpu()
    sample(own, "a mug", steps=1)
    assert torch.equal(own.unet.conv_in.weight.cpu(), value)


def test_an_error_in_a_turn_brings_the_unet_back(folder, monkeypatch):
    own = load_model(folder, torch.float32, device=NAME)
    own.offload()
    monkeypatch.setattr(own.text_encoder, "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(own, "a mug", steps=1)
    assert [place(own, p) for p in PARTS] == [NAME, "cpu", "cpu"]


@contextmanager
def no_memory_on_the_way_back(monkeypatch, after):
    """Once, so many of the UNet's parameters find memory on the device, and the next one none."""
    count = [0]

    def replace(p, value):
        count[0] += value.device.type == NAME and value.numel() > 0
        if count[0] == after:
            count[0] = 10**6
            raise torch.OutOfMemoryError("no memory")
        replace_data(p, value)

    with monkeypatch.context() as patched:
        patched.setattr(turns, "replace_data", replace)
        yield


def test_a_unet_that_found_no_memory_on_its_way_back_is_not_lost(folder, monkeypatch):
    own = load_model(folder, torch.float32, device=NAME)
    own.offload()
    (wanted,) = sample(own, "a mug", steps=1)
    for again in (lambda: None, lambda: own.turns.bring_back(own)):
        with no_memory_on_the_way_back(monkeypatch, 30), pytest.raises(torch.OutOfMemoryError):
            sample(own, "a mug", steps=1)
        assert any(not p.numel() for p in own.unet.parameters())
        again()
        (found,) = sample(own, "a mug", steps=1)
        assert found.tobytes() == wanted.tobytes() and all(p.numel() for p in own.unet.parameters())


@pytest.mark.slow
def test_a_preview_without_the_memory_to_end_leaves_the_training_whole(folder, monkeypatch):
    own = load_model(folder, torch.float32, device=NAME)
    events = []
    options = small_for("personalized_residuals", **RUN) | dict(preview_every=1, preview_prompts=("a {subject}",))
    run = Trainer(own, images=pictures(), class_word="mug", offload=True, **options)

    def hear(event):
        events.append(event)
        if event.kind == "step" and event.step == 1:
            patched.enter_context(no_memory_on_the_way_back(monkeypatch, 30))

    with ExitStack() as patched:
        run.train(hear)
    assert [e.step for e in events if e.kind == "step"] == [1, 2]
    assert sum("the preview failed" in e.data.get("text", "") for e in events) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ("personalized_residuals", "textboost", "custom_diffusion"))
def test_a_run_by_turns_is_the_same_run(folder, tmp_path, method):
    """Bit for bit, with previews in the middle; what trains or is read in every step stays."""
    found = {}
    for offload in (False, True):
        own = load_model(folder, torch.float32, device=NAME)
        out = tmp_path / str(offload)
        options = small_for(method, **RUN) | dict(offload=offload, preview_every=1, preview_prompts=("a {subject}",))
        run = Trainer(own, method, pictures(), class_word="mug", out=out, **options)
        seen = []
        with watched(own, seen):
            run.train()
        found[offload] = load_concept(out / "concept.safetensors")
        if offload:
            together = {there for name, there in seen if len(there) > 1}
            assert together <= {("unet", "text_encoders")}
    for name, tensor in found[False].tensors.items():
        assert torch.equal(tensor, found[True].tensors[name]), name
    for word, rows in found[False].words.items():
        assert all(torch.equal(a, b) for a, b in zip(rows, found[True].words[word], strict=True))


@pytest.mark.slow
def test_text_encoders_that_have_trained_are_whole_again(folder):
    """What trained on them comes back to where they are by then, and the next training's wait again."""
    own = load_model(folder, torch.float32, device=NAME)
    options = small_for("dreambooth_lora", **RUN) | dict(offload=True)
    options |= dict(train_text_encoder=True, text_encoder_form="whole")
    before = [p.cpu() for p in own.text_encoder.parameters()]
    Trainer(own, "dreambooth_lora", pictures(), class_word="mug", **options).train()
    assert place(own, "text_encoders") == NAME
    assert all(torch.equal(a, b.cpu()) for a, b in zip(before, own.text_encoder.parameters(), strict=True))
    run = Trainer(own, images=pictures(), class_word="mug", **small_for("personalized_residuals", **RUN))
    assert run.settings.offload and place(own, "text_encoders") == "cpu"  # as the model takes turns already
    assert not Trainer(own, images=pictures(), class_word="mug", offload=False).model.turns.on


@pytest.mark.slow
def test_nothing_is_left_of_turns_that_are_over(folder):
    own = load_model(folder, torch.float32, device=NAME)
    own.offload()
    sample(own, "a mug", steps=1)
    assert own.turns._kept
    own.offload(False)
    assert not own.turns._kept and {place(own, p) for p in PARTS} == {NAME}


def test_nobody_takes_turns_on_a_cpu():
    found = plan_run("tiny", "personalized_residuals", batch=1, offload=True, device="cpu", ram="2GB")
    assert found.fits and "offload" not in str(found)


def test_the_plan_takes_turns_where_they_are_needed():
    """The report's phase shrinks to the largest of three turns, and what waits is in the machine's memory."""
    beside = plan_run("tiny", "personalized_residuals", batch=1)
    turns = plan_run("tiny", "personalized_residuals", batch=1, offload=True)
    one, two = (next(p for p in found.phases if p.name == "report") for found in (beside, turns))
    assert two.bytes < one.bytes and two.ram > one.ram
    assert plan("tiny", "personalized_residuals", batch=1, offload=True).peak == beside.step.peak
    # a network that had to wait keeps its values in the machine's memory while it works
    own = load_model("tiny", torch.bfloat16)
    weights = sum(p.nbytes for p in own.unet.parameters())
    ram = {found.offload: {p.name: p.ram for p in found.phases} for found in (beside, turns)}
    for name in ("text states", "gradient check", "training step", "validation", "checkpoint", "finish"):
        assert ram[True][name] - ram[False][name] >= weights, name
    small = plan_run("tiny", "personalized_residuals", batch=1, offload=True, ram=300_000_000)
    assert "GB RAM are missing" in small.missing and "CUDA" not in small.missing
    between = (two.bytes + one.bytes) // 2
    assert plan_run("tiny", "personalized_residuals", batch=1, budget=between).settings["offload"] is True
    assert plan_run("tiny", "personalized_residuals", batch=1, budget=one.bytes * 2).settings["offload"] is False
