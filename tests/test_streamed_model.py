"""A UNet whose frozen weights wait in the machine's memory: the same bits as on the device, which never holds more."""

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from concept_cases import custom_diffusion, dreambooth_lora
from every_case import cases
from pcs_trainer import load_concept, load_model, sample
from pcs_trainer.concept.attach import predict
from pcs_trainer.memory.networks import networks_of
from pcs_trainer.memory.rehearsal import Rehearsal
from pcs_trainer.memory.whole_run import plan_run
from pcs_trainer.methods import settings_for
from pcs_trainer.training.trainer import Trainer
from pcs_trainer.unet.int8 import as_filed, layers_for_8_bits
from pcs_trainer.unet.streaming import at_hand, ring_bytes, waiting_weights
from pcs_trainer.unet.unet import UNet
from safetensors.torch import save_file
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


@torch.no_grad()
def test_weights_in_8_bits_are_the_files_where_that_is_asked(folder):
    own = opened(folder, "streamed", "int8")
    mine = predict(own, [], "a red mug")
    with as_filed(own.unet):
        found = predict(own, [], "a red mug")
    wanted = predict(opened(folder, "device"), [], "a red mug")
    torch.testing.assert_close(found.cpu(), wanted.cpu(), rtol=1e-4, atol=1e-5)
    assert torch.equal(predict(own, [], "a red mug"), mine)


def a_larger_text(folder, where):
    """The embedded model with so many blocks that all their keys and values are more than the ring holds."""
    shutil.copytree(folder, where)
    file = where / "unet" / "config.json"
    config = json.loads(file.read_text()) | {"transformer_layers_per_block": 10}
    file.write_text(json.dumps(config))
    torch.manual_seed(0)
    for old in (where / "unet").glob("*.safetensors"):
        old.unlink()
    save_file(UNet.from_config(config).state_dict(), where / "unet" / "diffusion_pytorch_model.safetensors")
    return where


@torch.no_grad()
@pytest.mark.parametrize("weights", ("full", "int8"))
def test_keys_and_values_of_many_blocks_pass_in_parts_that_fit(folder, tmp_path, weights):
    """As SDXL's do: 140 projections of the text."""
    where = a_larger_text(folder, tmp_path / "large")
    wanted, own = opened(where, "device", weights), opened(where, "streamed", weights)
    assert torch.equal(predict(own, [], "a red mug"), predict(wanted, [], "a red mug"))
    stack = own.unet.stacks()[1]
    assert len(stack.groups) > 4 and [layer for group in stack.groups for layer in group] == stack.layers
    assert sum(layer.weight.nbytes for layer in stack.layers) > own.unet.ring.size


def test_threads_that_share_a_model_draw_what_one_draws(folder):
    own = opened(folder, "streamed")

    def drawn(seed):
        return [image.tobytes() for image in sample(own, "a red mug", steps=3, seed=seed)]

    wanted = [drawn(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(drawn, range(2))) == wanted


@torch.no_grad()
def test_what_was_joined_for_a_network_before_is_let_go(folder):
    own = opened(folder, "streamed")
    ring, held = own.unet.ring, []
    for _ in range(4):
        predict(own, [], "a red mug")
        own.unet.stacks()[1].forget()  # as where a concept brings keys and values of its own
        held.append(
            len({id(w) for w in (*ring._here, *ring._next, *(n for a in ring._next.values() for n in a.values()))})
        )
    assert held[1] == held[2] == held[3]


@torch.no_grad()
def test_a_replaced_parameter_is_named_and_one_that_trains_refused(folder):
    own = opened(folder, "streamed")
    layer = own.unet.mid_block.attentions[0].proj_in
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="weight requires a gradient, which frozen_linear never computes"):
        predict(own, [], "a red mug")
    layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    with pytest.raises(RuntimeError, match="a streamed weight was replaced by another parameter"):
        predict(own, [], "a red mug")


@torch.no_grad()
def test_a_network_may_be_copied(folder):
    unet = opened(folder, "streamed").unet
    wide = unet.settings["cross_attention_dim"]
    given = torch.randn(1, 8, 8, 8).to(NAME), torch.tensor([3]).to(NAME), torch.randn(1, 7, wide).to(NAME)
    wanted, other = unet(*given), copy.deepcopy(unet)
    assert other.ring is not unet.ring and other.mid_block.resnets[0].conv1.streamed.ring is other.ring
    assert torch.equal(other(*given), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("method", ("dreambooth", "lora_fa"))
def test_a_plan_that_is_measured_streams_as_it_counted(method):
    """A real step of the planner, on a device of its own."""
    frozen = method != "dreambooth"
    chosen = dict(resident="streamed") if frozen else dict(states="streamed")
    s = settings_for(None, method, **chosen)
    real = Rehearsal(networks_of(load_model("tiny")), s, (2, 8), torch.float32, NAME, counted=False)
    real.step()
    whole = sum(p.nbytes for p in real.unet.parameters())
    assert (on_the_device(real.unet) < 0.2 * whole) == frozen
    coded = [state["state1"] for state in real.optimizer.state.values() if state["state1"].dtype == torch.uint8]
    assert (not frozen) == bool(coded) and all(t.device.type == "cpu" for t in coded)


def test_a_cpu_streams_nothing():
    for made in (
        lambda: load_model("tiny", resident="streamed"),
        lambda: Trainer("tiny", images=pictures(), class_word="mug", resident="streamed"),
        lambda: plan_run("tiny", "lora_fa", device="cpu", resident="streamed"),
    ):
        with pytest.raises(ValueError, match=r"on the CPU all is in RAM\. Fix: resident='device'"):
            made()
    with pytest.raises(ValueError, match=r"on the CPU all is in RAM\. Fix: states='device'"):
        Trainer("tiny", images=pictures(), class_word="mug", states="streamed")


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
        Trainer(
            load_model("tiny", device=NAME, resident="streamed"), "dreambooth", pictures(), class_word="mug", steps=1
        )


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
