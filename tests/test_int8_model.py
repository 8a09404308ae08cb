"""A UNet whose frozen weights are held in 8 bits: loading, training by each method, concepts on it and from it."""

import re
from types import SimpleNamespace

import pytest
import torch
from concept_cases import custom_diffusion, dreambooth, dreambooth_lora
from pcs_trainer import load_concept, load_model
from pcs_trainer.cli.commands import plan as plan_command
from pcs_trainer.cli.commands.train import within_budget
from pcs_trainer.concept.attach import attached, in_place, predict
from pcs_trainer.errors import UnsupportedModel
from pcs_trainer.memory.planner import plan
from pcs_trainer.model.fingerprint import fingerprint, same_base
from pcs_trainer.model.sources import TINY
from pcs_trainer.training.trainer import Trainer
from pcs_trainer.unet.int8 import KEPT, as_filed, layers_for_8_bits, original, widen
from safetensors.torch import load_file, save_file
from trainer_cases import METHODS, cache, pictures, trainer

__all__ = ["cache"]
FROZEN = tuple(m for m in METHODS if m != "dreambooth")


@pytest.fixture(scope="module")
def int8():
    return load_model("tiny", weights="int8")


def bits(unet):
    return {name: p.detach().clone() for name, p in unet.named_parameters()}


def same_bits(unet, before):
    return all(torch.equal(p, before[name]) for name, p in unet.named_parameters()) and len(before) == len(bits(unet))


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def test_inner_weights_are_codes_and_the_rest_is_as_it_was(int8, model):
    full = dict(model.unet.named_parameters())
    layers = {f"{name}.weight" for name in layers_for_8_bits(int8.unet)}
    assert len(layers) > 50
    for name, p in int8.unet.named_parameters():
        if name in layers:
            assert p.dtype == torch.int8 and p.shape == full[name].shape and name.partition(".")[0] not in KEPT
        elif not name.endswith("weight_scales"):
            assert torch.equal(p, full[name])
    held = sum(p.nbytes for n, p in int8.unet.named_parameters() if n.rpartition(".")[0] + ".weight" in layers)
    whole = sum(full[name].numel() for name in layers)
    # a byte a weight and two a block of 64; narrow layers end with blocks that are not full; biases are float32
    biases = sum(4 * p.numel() for n, p in full.items() if n.rpartition(".")[0] + ".weight" in layers and p.dim() == 1)
    assert whole < held - biases < 1.06 * whole


def test_predictions_are_near_and_the_model_is_known_again(int8, model):
    with torch.no_grad():
        distance = relative(predict(int8, [], "a red mug"), predict(model, [], "a red mug"))
    assert 1e-4 < distance < 0.03  # the tiny network; wider ones err less
    assert same_base(fingerprint(int8), fingerprint(model))


def test_a_layer_gets_its_own_weight_back_from_the_file(int8, model):
    before = bits(int8.unet)
    for name, layer in layers_for_8_bits(int8.unet).items():
        own = model.unet.get_parameter(f"{name}.weight")
        assert torch.equal(original(layer, int8.unet.conv_in.weight), own)
    undo = widen(layer, int8.unet.conv_in.weight)
    assert torch.equal(layer.weight, own) and layer.weight_scales is None
    undo()
    assert same_bits(int8.unet, before)


def test_a_network_in_8_bits_computes_with_its_files_weights_where_that_is_asked(model):
    own = load_model("tiny", weights="int8")
    before = bits(own.unet)
    with torch.no_grad():
        wanted, mine = predict(model, [], "a red mug"), predict(own, [], "a red mug")
        with as_filed(own.unet):
            found = predict(own, [], "a red mug")
        assert torch.equal(predict(own, [], "a red mug"), mine)
    # the full model joins layers that read the same input, and its weights are packed
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert relative(mine, wanted) > 1e-4 and same_bits(own.unet, before)


def test_weights_that_are_not_finite_are_named(tmp_path):
    import shutil

    shutil.copytree(TINY, tmp_path / "tiny")
    (file,) = (tmp_path / "tiny" / "unet").glob("*.safetensors")
    tensors = load_file(file)
    name = "mid_block.resnets.0.conv1.weight"
    tensors[name][0, 0, 0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UnsupportedModel, match=f"{name}.*NaN or infinite"):
        assert load_model(tmp_path / "tiny", weights="int8").unet is None
    with pytest.raises(ValueError, match="weights must be one of full, int8"):
        load_model("tiny", weights="int4")


@pytest.mark.slow
@pytest.mark.parametrize("method", FROZEN)
def test_each_method_trains_on_it_and_draws_on_the_full_model(method, model, tmp_path):
    int8 = load_model("tiny", weights="int8")
    before, events = bits(int8.unet), []
    run = trainer(int8, method, out=tmp_path, steps=6, learning_rate=1e-2, check_backend=True)
    assert run.settings.weights == "int8"
    run.train(events.append)
    assert same_bits(int8.unet, before)
    proofs = " ".join(e.data["text"] for e in events if e.kind == "proof")
    assert "gradients agree" in proofs and "matches the trained model" in proofs
    found = re.search(r"8 bits are (\d+\.\d)% from those of the model's files", proofs)
    assert found is not None and 0.1 < float(found[1]) < 3
    concept = load_concept(tmp_path / "concept.safetensors", model)
    with torch.no_grad():
        changed = {}
        for m in (int8, model):
            prompt = concept.instance_prompt
            changed[m] = predict(m, [concept], prompt) - predict(m, [concept], prompt, strength=0.0)
    if concept.tensors:  # a word alone changes the prompt, which both sides have
        assert relative(changed[int8], changed[model]) < 0.25


def test_a_whole_network_is_not_trained_in_8_bits():
    with pytest.raises(ValueError, match=r"trains every weight of the UNet.*weights='full'"):
        trainer(load_model("tiny", weights="int8"), "dreambooth", steps=1)
    assert trainer(load_model("tiny", weights="int8"), "dreambooth", steps=1, weights="full").model.weights == "full"


def test_the_settings_decide_how_the_model_is_held(model):
    own = load_model("tiny")
    assert own.unet.conv_in.weight.dtype == torch.float32
    run = Trainer(own, images=pictures(), class_word="mug", weights="int8")
    assert own.weights == "int8" and run.model.unet.mid_block.resnets[0].conv1.weight.dtype == torch.int8
    Trainer(own, images=pictures(), class_word="mug")  # as it is held
    assert own.weights == "int8"
    Trainer(own, images=pictures(), class_word="mug", weights="full")
    assert own.unet.mid_block.resnets[0].conv1.weight.dtype == torch.float32


def test_a_trainer_holds_the_model_before_it_asks_for_its_words(monkeypatch):
    """A checkpoint file's tokenizers come with a pipeline, which asks the UNet: it would be read whole first."""
    own, seen = load_model("tiny"), []
    monkeypatch.setattr(
        "pcs_trainer.training.trainer.choose_token", lambda m, s: seen.append((m.weights, m.turns.on)) or s
    )
    Trainer(own, images=pictures(), class_word="mug", token="<mug>", weights="int8", offload=True)
    assert seen == [("int8", True)]
    with pytest.raises(ValueError, match="weights must be one of full, int8"):
        own.hold("int4")


def test_two_trainers_on_one_model_each_have_it_as_they_want_it(tmp_path):
    own = load_model("tiny")
    first = trainer(own, steps=2, weights="int8")
    second = trainer(own, "dreambooth", steps=2, weights="full")
    kinds = {}
    for run in (first, second):
        run.train(
            lambda event, run=run: kinds.setdefault(
                run.settings.method, own.unet.mid_block.resnets[0].conv1.weight.dtype
            )
        )
    assert kinds == {"personalized_residuals": torch.int8, "dreambooth": torch.float32}
    first.trainable()
    third = trainer(own, steps=2, weights="full")  # what trains stays on the network that it was put on
    assert own.weights == "int8" and any(layer.residuals for layer in layers_for_8_bits(own.unet).values())
    with pytest.raises(ValueError, match="another training has its tensors"):
        third.trainable()
    first.train()
    third.train()
    assert own.weights == "full"


def test_a_budget_on_resume_keeps_the_weights_that_the_run_learns_by(tmp_path, monkeypatch):
    own, asked = load_model("tiny"), []
    trainer(own, out=tmp_path, steps=2, batch=2, weights="int8").train(should_stop=lambda: True)
    monkeypatch.setattr(plan_command, "chosen_plan", lambda *given: asked.append(given[-1]) or {})
    options = SimpleNamespace(method="personalized_residuals", budget=10**9, ram=None, no_report=True, resume=True)
    within_budget(options, own, {"rank": 4}, tmp_path)
    within_budget(options, own, {"weights": "full"}, tmp_path)
    options.resume = False
    within_budget(options, own, {}, tmp_path)
    began = {"weights": "int8", "batch": 2, "accumulate": 1}
    assert asked == [began | {"rank": 4}, began | {"weights": "full"}, {}]


def test_concepts_with_whole_values_act_as_on_the_full_model(int8, model):
    before = bits(int8.unet)
    for made in (custom_diffusion(model), dreambooth_lora(model)):
        with torch.no_grad():
            ours = predict(int8, [made], "a mug") - predict(int8, [], "a mug")
            theirs = predict(model, [made], "a mug") - predict(model, [], "a mug")
        assert relative(ours, theirs) < 0.2
        assert same_bits(int8.unet, before)
        with attached(int8, [made], [0.5]), torch.no_grad():
            pass
        assert same_bits(int8.unet, before)


def test_a_whole_network_is_drawn_in_8_bits(model):
    """A DreamBooth concept takes the place of the 8-bit weights, in 8 bits itself."""
    made = dreambooth(model)
    assert {f"unet.{name}" for name, _ in model.unet.named_parameters()} <= made.tensors.keys()
    found = {}
    for name in ("full", "int8"):
        own = load_model("tiny", weights=name)
        with in_place(own, made) as rest, torch.no_grad():
            assert not any(name.startswith("unet.") for name in rest.tensors)
            held = {own.unet.get_parameter(f"{n}.weight").dtype for n in layers_for_8_bits(own.unet)}
            assert held == {torch.int8 if name == "int8" else torch.float32}
            found[name] = predict(own, [], "a mug")
    assert relative(found["int8"], found["full"]) < 0.05 < relative(found["full"], predict(model, [], "a mug"))


def test_a_difference_on_a_whole_network_in_8_bits_is_added_to_that_network(model):
    made = dreambooth(model)
    name = "unet.mid_block.attentions.0.proj_out.weight"
    own = load_model("tiny", weights="int8")
    with in_place(own, made):
        layer = own.unet.mid_block.attentions[0].proj_out
        held = original(layer, own.unet.conv_in.weight)
        assert relative(held, made.tensors[name]) < 0.02 < relative(held, model.unet.get_parameter(name[5:]))


def test_the_plan_counts_codes_and_scales_and_at_most_one_expanded_weight():
    """What the planner says of the weights is what a loaded model holds."""
    found = {w: plan("tiny", "personalized_residuals", batch=1, weights=w) for w in ("full", "int8")}
    int8 = load_model("tiny", dtype=torch.bfloat16, weights="int8")
    assert found["int8"].components["UNet weights"] == sum(p.nbytes for p in int8.unet.parameters())
    largest = 2 * max(layer.weight.numel() for layer in layers_for_8_bits(int8.unet).values())
    more = found["int8"].peak - found["int8"].components["UNet weights"]
    less = found["full"].peak - found["full"].components["UNet weights"]
    assert less <= more <= less + 2 * largest
