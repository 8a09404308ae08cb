"""A UNet whose frozen weights wait in the machine's memory: the same bits as on the device, which never holds more."""

import pytest
import torch
from concept_cases import custom_diffusion, dreambooth_lora
from every_case import cases
from pcs_trainer import load_concept, load_model, sample
from pcs_trainer.concept.attach import predict
from pcs_trainer.memory.whole_run import plan_run
from pcs_trainer.training.trainer import Trainer
from pcs_trainer.unet.int8 import layers_for_8_bits
from pcs_trainer.unet.streaming import at_hand, ring_bytes, waiting_weights
from second_device import NAME, calls, folder, model, one_thread, twin
from trainer_cases import METHODS, cache, pictures, small_for

__all__ = ["cache", "calls", "folder", "model", "one_thread", "twin"]

MAIN = ("personalized_residuals", "textboost", "custom_diffusion")  # residuals, a text encoder, a model's own values
RUN = dict(steps=4, batch=1, prior_images=2, prior_steps=2, bank=6, rank=2, learning_rate=1e-2, probe_every=2)


def opened(folder, resident, weights="full"):
    return load_model(folder, torch.float32, device=NAME, weights=weights, resident=resident)


def on_the_device(unet):
    return sum(p.nbytes for p in unet.parameters() if p.device.type == NAME)


def test_inner_weights_wait_and_the_rest_is_on_the_device(folder):
    unet = opened(folder, "streamed").unet
    layers = layers_for_8_bits(unet)
    for name, p in unet.named_parameters():
        path, _, kind = name.rpartition(".")
        assert (p.device.type == "cpu") == (kind == "weight" and path in layers), name
    whole = sum(p.nbytes for p in unet.parameters())
    assert on_the_device(unet) < 0.1 * whole and unet.ring.size < 0.7 * whole
    with pytest.raises(ValueError, match="resident must be one of device, streamed, not 'disk'"):
        load_model(folder, resident="disk")


@pytest.mark.slow
@pytest.mark.parametrize("weights", ("full", "int8"))
def test_a_drawing_is_the_same_and_runs_ahead(folder, weights):
    wanted = sample(opened(folder, "device", weights), "a red mug", steps=2)
    own = opened(folder, "streamed", weights)
    found = sample(own, "a red mug", steps=2)
    assert [a.tobytes() for a in found] == [b.tobytes() for b in wanted]
    ring, held = own.unet.ring, on_the_device(own.unet)
    ring.taken = ring.missed = 0
    sample(own, "a blue cup", steps=3)
    assert ring.taken > 100 and ring.missed < ring.taken / 25  # where the text's keys begin and a step ends
    assert on_the_device(own.unet) == held


def trained(folder, out, method, resident, steps=4, resume=False, **settings):
    own = load_model(folder, torch.float32, device=NAME)
    options = small_for(method, **RUN) | dict(preview_every=3, preview_prompts=("a {subject}",)) | settings
    run = Trainer(own, method, pictures(), class_word="mug", out=out, resident=resident, **options | {"steps": steps})
    events = []
    run.train(events.append, resume=resume)
    assert own.resident == resident
    return load_concept(out / "concept.safetensors"), events


@pytest.mark.slow
@pytest.mark.parametrize("method", cases(MAIN, (m for m in METHODS if m not in (*MAIN, "dreambooth"))))
def test_a_run_is_the_same_run_bit_for_bit(folder, tmp_path, method):
    """With the proofs, a probe, a preview, networks by turns, a recomputation plan, and a resume in the other kind."""
    wanted, _ = trained(folder, tmp_path / "device", method, "device", plan="C")
    trained(folder, tmp_path / "streamed", method, "device", steps=2, plan="C")
    found, events = trained(folder, tmp_path / "streamed", method, "streamed", resume=True, plan="B", offload=True)
    assert not [e.data["text"] for e in events if e.kind == "warning"]
    assert set(wanted.tensors) == set(found.tensors)
    for name, tensor in wanted.tensors.items():
        assert torch.equal(tensor, found.tensors[name]), name
    for word, rows in wanted.words.items():
        assert all(torch.equal(a, b) for a, b in zip(rows, found.words[word], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", cases(("custom_diffusion",), ("personalized_residuals",)))
def test_it_goes_together_with_8_bits(folder, tmp_path, method):
    found = [trained(folder, tmp_path / r, method, r, weights="int8")[0] for r in ("device", "streamed")]
    for name, tensor in found[0].tensors.items():
        assert torch.equal(tensor, found[1].tensors[name]), name


@pytest.mark.parametrize("kind", (dreambooth_lora, custom_diffusion))
def test_a_concept_draws_the_same_and_leaves_nothing(folder, kind):
    own, other = opened(folder, "streamed"), opened(folder, "device")
    concept = kind(load_model(folder, torch.float32))
    concepts = [concept, concept.renamed("<other>")] if concept.words else [concept]
    with torch.no_grad():
        predict(own, [], "a mug")  # joins the layers that read the same input
        before = {n: (p.data_ptr(), p.device) for n, p in own.unet.named_parameters()}
        found = [predict(m, concepts, concept.instance_prompt, strength=0.7) for m in (own, other)]
    assert torch.equal(found[0].cpu(), found[1].cpu())
    assert {n: (p.data_ptr(), p.device) for n, p in own.unet.named_parameters()} == before
    assert all(layer.streamed is not None for layer in layers_for_8_bits(own.unet).values())


def test_a_weight_at_hand_goes_back(folder):
    unet = opened(folder, "streamed", "int8").unet
    name = "mid_block.resnets.0.conv1.weight"
    layer = unet.get_submodule(name.removesuffix(".weight"))
    value = layer.weight.clone()
    undo = at_hand(unet, name)
    assert layer.weight.device.type == NAME and layer.weight.dtype == torch.float32 and layer.streamed is None
    for step in reversed(undo):
        step()
    assert torch.equal(layer.weight, value) and layer.streamed.take().codes.cpu().equal(value)


def test_a_whole_network_is_not_streamed():
    with pytest.raises(ValueError, match=r"trains every weight of the UNet.*resident='device'"):
        Trainer(load_model("tiny", resident="streamed"), "dreambooth", pictures(), class_word="mug", steps=1)


@pytest.mark.slow
def test_the_plan_counts_the_ring_and_takes_it_last():
    """What waits is in the machine's memory; full weights by turns, and 8 bits, come before it."""
    asked = dict(model="tiny", method="personalized_residuals", batch=1, device="cuda")
    whole, found = plan_run(**asked), plan_run(**asked, resident="streamed")
    unet = load_model("tiny").unet
    waiting = sum(p.nbytes for p in waiting_weights(unet)) // 2  # planned for in bfloat16
    saved = waiting - ring_bytes(unet) // 2
    parts = [p.step.components["UNet weights"] for p in (whole, found)]
    assert parts[0] > parts[1] and abs(parts[0] - parts[1] - saved) < 4096
    rams = {a.name: b.ram - a.ram for a, b in zip(whole.phases, found.phases, strict=True)}
    assert all(more >= waiting for name, more in rams.items() if name not in ("loading", "photos to latents"))
    assert "wait in RAM" in str(found) and found.settings["resident"] == "streamed"
    turns = plan_run(**asked, offload=True, weights="int8", resident="device")
    low = plan_run(**asked, budget=turns.largest.bytes - 1_000)
    assert low.settings["resident"] == "streamed" and low.settings["weights"] == "full"
