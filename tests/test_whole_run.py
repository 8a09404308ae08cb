"""Every phase of a run is planned, and the budget is the run's: what fits, what is packed, what a refusal names."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pcs_trainer.cli import entry as cli
from pcs_trainer.memory import whole_run
from pcs_trainer.memory.autoencoder import autoencoder_dtypes
from pcs_trainer.memory.counts import Request, counted_once
from pcs_trainer.memory.networks import Networks, networks_of
from pcs_trainer.memory.phases import LIBRARIES, Phases
from pcs_trainer.memory.whole_run import plan_run
from pcs_trainer.methods import settings_for
from pcs_trainer.model.model import Model
from test_memory_plan import TEXT
from unet_families import SMALL

VAE = {
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
MODEL = {"unet": SMALL, "text_encoder": TEXT, "vae": VAE}
SHALLOW = MODEL | {"unet": SMALL | {"layers_per_block": 1}}  # where plans are made again and again
EVERYTHING = dict(preview_every=1, preview_prompts=("a {}",))


def step_of(method, device="cuda", size=128, dtype=torch.bfloat16, **settings):
    """The step's count. A CUDA step is counted on the meta device; the CPU's, whose packed copies are followed, takes
    four times as long: only tests of what the CPU holds ask for it."""
    s = settings_for(None, method, **settings)
    pictures = s.batch * (2 if s.prior_weight else 1)
    return counted_once(Request(networks_of(MODEL), s, (pictures, size // 8), dtype, device, False))


def phases(method, device="cuda", size=128, report=True, dtype=torch.bfloat16, **settings):
    step = step_of(method, device, size, dtype, **settings)
    names = {phase.name: phase for phase in Phases(step, {"": "A"}, size, LIBRARIES, report).all()}
    return names, step


@pytest.mark.slow
def test_the_settings_decide_which_phases_there_are():
    names, _ = phases("dreambooth", **EVERYTHING)
    before = ["loading", "photos to latents", "class images", "text states", "gradient check"]
    after = ["training step", "validation", "preview", "checkpoint", "finish", "report"]
    assert list(names) == before + after
    fewer, _ = phases("personalized_residuals", report=False, check_backend=False, probe_every=0)
    assert list(fewer) == ["loading", "photos to latents", "text states", "training step", "checkpoint", "finish"]


@pytest.mark.slow
def test_the_step_s_phase_is_the_planner_s_count_and_what_the_process_has():
    names, step = phases("personalized_residuals", "cpu", check_backend=False)
    assert names["training step"].parts["working memory"] == step.components({"": "A"})["working memory"]
    assert names["training step"].parts["interpreter and libraries"] == LIBRARIES
    assert names["training step"].ram == names["training step"].bytes
    on_gpu, _ = phases("personalized_residuals")
    assert "packed copies of weights" not in on_gpu["training step"].parts
    assert on_gpu["finish"].ram < on_gpu["finish"].bytes + LIBRARIES


@pytest.mark.slow
def test_the_gradient_check_counts_the_scores_of_the_reference():
    """At 32 latents a side, whatever the photos' size: so many positions squared, in every head."""
    names, _ = phases("personalized_residuals", size=512)
    made = names["gradient check"].parts["both gradients, working memory"]
    heads = SMALL["block_out_channels"][0] // (SMALL["block_out_channels"][0] // SMALL["attention_head_dim"])
    scores = heads * 1024 * 1024 * 4
    assert 2 * scores < made < 8 * scores
    assert phases("personalized_residuals", size=256)[0]["gradient check"].parts == names["gradient check"].parts


@pytest.mark.slow
def test_what_is_kept_beside_what_trains_is_counted():
    lora = step_of("lora_fa", rank=8)
    frozen = sum(t.nbytes for t in lora.rehearsal.learner.fixed.values())
    assert lora.lasting()["kept beside what trains"] == frozen > 0
    custom = step_of("custom_diffusion", "cpu")
    masters = [p for n, p in custom.rehearsal.learner.parameters.items() if "attn2" in n]
    assert custom.lasting()["kept beside what trains"] == sum(2 * p.numel() for p in masters)
    names, on_gpu = phases("custom_diffusion", device="cuda")
    assert on_gpu.lasting()["kept beside what trains"] == 0
    assert names["training step"].ram == LIBRARIES + sum(2 * p.numel() for p in masters)


@pytest.mark.slow
def test_a_counted_step_holds_the_text_as_a_real_one_does():
    """Custom Diffusion's keys and values with a constant first token are made anew from the projections' own."""
    rehearsal, held = step_of("custom_diffusion").rehearsal, []
    method = rehearsal.method

    def hold(kv):
        held.append(kv)
        return method.hold_text(kv)

    rehearsal.method = replace(method, hold_text=hold)
    try:
        rehearsal.count()
    finally:
        rehearsal.method = method
    assert held and all(set(kv) == set(rehearsal.unet.attention_names()) for kv in held)


@pytest.mark.slow
def test_packed_copies_follow_the_budget():
    arguments = dict(
        model=SHALLOW, method="personalized_residuals", resolution=128, batch=1, device="cpu", report=False
    )
    arguments |= {"check_backend": False, "probe_every": 0}  # phases with counts of their own
    arguments |= {"dtype": torch.float32}  # which every CPU packs
    free = plan_run(**arguments)
    assert free.fits and free.packing == "both" and free.missing == ""
    step = next(phase for phase in free.phases if phase.name == "training step")
    packed = step.parts["packed copies of weights"]
    needed, found = free.largest.bytes, []
    for budget in (needed, needed - packed // 8, needed - packed):
        found.append(plan_run(**arguments, budget=budget))
    assert found[0].packing == "both" and found[-1].packing != "both"
    for run in found:
        assert run.fits == (run.largest.bytes <= run.budget)
        assert run.settings["packing"] == run.packing
    assert plan_run(**arguments, packing="none").packing == "none"


@pytest.mark.slow
def test_a_refusal_names_the_phase_and_what_leaves_it_out():
    arguments = dict(model=SHALLOW, method="personalized_residuals", resolution=32, batch=1, device="cuda")
    arguments |= dict(weights="full", offload=False, resident="device")  # asked for, so that nothing else is tried
    free = plan_run(**arguments)
    assert free.largest.name == "report"  # all networks at once
    found = plan_run(**arguments, budget=free.largest.bytes - 1_000)
    assert not found.fits and "'report'" in found.missing and "--no-report" in found.missing
    assert found.missing.count(". ") == 0 and found.missing in str(found)
    assert plan_run(**arguments, budget=free.largest.bytes - 1_000, report=False).fits
    ram = plan_run(**arguments, ram="300MB")
    assert not ram.fits and "GB RAM are missing" in ram.missing


@pytest.mark.slow
def test_the_report_is_counted_at_the_size_of_the_training_as_it_is_drawn():
    small, large = (phases("personalized_residuals", size=size, check_backend=False)[0]["report"] for size in (64, 256))
    assert small.parts["working memory"] * 8 < large.parts["working memory"]
    assert "concept" not in phases("dreambooth")[0]["report"].parts  # it is in the base's place


@pytest.mark.parametrize(
    ("upcast", "dtype", "sdxl", "expected"),
    [
        (None, torch.bfloat16, False, (torch.bfloat16, torch.bfloat16)),
        (None, torch.bfloat16, True, (torch.float32, torch.bfloat16)),
        (None, torch.float16, False, (torch.float32, torch.float32)),  # SD1.5's file leaves diffusers' default: it asks
        (False, torch.float16, True, (torch.float16, torch.float16)),
    ],
)
def test_the_autoencoder_is_counted_in_the_precision_that_it_asks_for(upcast, dtype, sdxl, expected):
    config = VAE if upcast is None else VAE | {"force_upcast": upcast}
    assert autoencoder_dtypes(config, dtype, sdxl) == expected


@pytest.mark.slow
def test_photos_are_encoded_while_the_text_encoders_that_drew_class_images_are_there():
    drawn, own = (phases("dreambooth", prior=prior)[0]["photos to latents"].parts for prior in ("drawn", "own"))
    assert drawn["text encoder weights"] > 0 and "text encoder weights" not in own
    assert "class images" not in phases("dreambooth", prior="own")[0]


@pytest.mark.slow
def test_the_check_of_float16_counts_the_network_in_float32():
    halves, own = (
        phases("personalized_residuals", "cuda", dtype=dtype)[0]["gradient check"]
        for dtype in (torch.float16, torch.bfloat16)
    )
    assert halves.parts["weights in float32"] == own.parts["UNet weights"]  # each number takes two bytes more
    assert halves.parts["both gradients, working memory"] > 1.25 * own.parts["both gradients, working memory"]
    assert halves.ram == own.ram + own.parts["UNet weights"]  # the 16 bits wait there


@pytest.mark.slow
def test_the_command_prints_every_phase(capsys, tmp_path):
    file = tmp_path / "model.json"
    file.write_text(json.dumps(SHALLOW))
    words = ["plan", "--model-config", str(file), "--resolution", "64", "--batch", "1", "--device", "cpu"]
    assert cli.main([*words, "--ram", "8GB"]) == 0
    text = capsys.readouterr().out
    assert "training step" in text and "(largest)" in text and "RAM limit: 8.000 GB" in text and "It fits." in text
    assert cli.main([*words, "--ram", "100MB"]) == 3
    assert "are missing" in capsys.readouterr().out
    file.write_text("[1]")
    assert cli.main(words) == 2
    assert "--model-config" in capsys.readouterr().err


def test_a_checkpoint_file_is_planned_for_without_the_device(monkeypatch):
    parts = {"unet": SimpleNamespace(config=SMALL), "text_encoders": [], "vae": SimpleNamespace(config=VAE)}
    seen = []
    monkeypatch.setattr(Model, "_get", lambda model, name: seen.append((name, model.device)) or parts[name])
    model = Model(type("File", (), {})(), torch.bfloat16, "cuda")
    assert networks_of(model).vae == networks_of(model).vae == VAE
    assert sorted(seen) == sorted((name, "cpu") for name in parts)  # once


def test_a_network_without_an_autoencoder_is_planned_with_the_families_own():
    assert networks_of(SMALL).vae["block_out_channels"] == [128, 256, 512, 512]
    assert networks_of(MODEL).vae == VAE and isinstance(networks_of(MODEL), Networks)
    with pytest.raises(ValueError, match="the RAM limit"):
        plan_run(MODEL, "personalized_residuals", 64, ram="much")


def test_what_cannot_be_planned_is_said_before_anything_is_counted():
    for wrong, sentence in (
        (dict(resolution="512"), "resolution must be a multiple of"),
        (dict(resolution=-64), "resolution must be a multiple of"),
        (dict(batch=2.5), "batch must be an integer of at least 1"),
        (dict(dtype=torch.int8), "dtype must be torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=sentence):
            plan_run("tiny", "dreambooth", **wrong, budget="8GB")


@pytest.mark.slow
def test_a_limit_of_ram_names_what_takes_it(monkeypatch):
    asked = dict(model="tiny", method="dreambooth", resolution=32, batch=1, report=False, ram="0.55GB")
    found = plan_run(**asked, states="streamed", offload=True)
    assert "--states device or a run without --offload takes less of it" in found.missing
    monkeypatch.setattr(whole_run, "LARGE", 0)
    other = plan_run(**asked | dict(ram=None), budget="0.1GB", optimizer="adamw", step_in_backward=False)
    assert not other.fits and other.states == "device"  # only states in 8 bits are streamed
