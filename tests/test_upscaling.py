"""DreamBooth's super-resolution stage: what the UNet reads, the run, the commands, and diffusers' pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pcs_trainer import load_concept, load_model, sample, upscale
from pcs_trainer.cli import entry as cli
from pcs_trainer.concept.formats.pipeline import _rescaled
from pcs_trainer.concept.formats.writing import export
from pcs_trainer.data.batches import Bank, draw_batch
from pcs_trainer.memory.planner import plan
from pcs_trainer.methods import settings_for
from pcs_trainer.model.autoencoder import Moments
from pcs_trainer.model.upscaler import level_of, variance_at
from pcs_trainer.tiny.make.train_upscaler import CONFIG, train_upscaler
from pcs_trainer.tiny.make.train_upscaler import write_upscaler as small_upscaler
from pcs_trainer.training.trainer import Trainer
from pcs_trainer.unet.unet import UNet
from PIL import Image
from trainer_cases import cache as cache
from trainer_cases import pictures
from upscaler_cases import write_upscaler

METHODS = ("dreambooth", "dreambooth_lora", "lora_fa")
STAGE = dict(stage="super_resolution", class_word="mug", check_backend=False, probe_every=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_upscaler(tmp_path_factory.mktemp("up-scaler") / "x4")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    """The folder of a short run."""
    out = tmp_path_factory.mktemp("run") / "details"
    Trainer(load_model(folder), "dreambooth", pictures(), out=out, **STAGE, steps=3, learning_rate=1e-3).train()
    return out


def small_pictures(count=2):
    return [np.asarray(Image.fromarray(p).resize((16, 16), Image.Resampling.BICUBIC)) for p in pictures(count)]


def size_of(file) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def apart(a, b) -> float:
    """The largest difference of two lists of pictures, of 1."""
    return max(
        float(np.abs(np.asarray(x, float) - np.asarray(y, float)).max()) / 255 for x, y in zip(a, b, strict=True)
    )


def test_the_unet_reads_the_reduced_photo_and_the_level_of_its_noise(model):
    variance = variance_at(model.low_res_schedule, 7)
    trainer = Trainer(model, "dreambooth", pictures(), **STAGE, noise_level=variance, batch=2)
    objective, calls = trainer.objective(), []
    handle = model.unet.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        objective.predicted(objective.inputs(objective.batch(0, 0)))
    handle.remove()
    trainer.learner.restore()
    x, _, _, added = calls[0]
    assert x.shape[1] == 11 and added["class_labels"].tolist() == [7, 7]
    clean = [torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 127.5 - 1 for p in small_pictures()]
    for read in x[:, 8:]:
        noise = min(((read - (1 - variance) ** 0.5 * c) / variance**0.5 for c in clean), key=torch.std)
        assert float(noise.std()) == pytest.approx(1, abs=0.1) and abs(float(noise.mean())) < 0.1


def test_the_noise_on_the_small_picture_differs_by_micro_batch_rank_and_step():
    moments = Moments(torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4, 4))
    bank = Bank(moments, ["p"], small=torch.zeros(1, 3, 4, 4))
    s = settings_for(None, "dreambooth", stage="super_resolution", class_word="dog")

    def timesteps(count, generator):
        return torch.randint(1000, (count,), generator=generator)

    def small(step, micro, share, variance=1e-3):
        return draw_batch(bank, None, ["n"], s, step, micro, share, timesteps, small_noise=variance).small

    first = small(0, 0, (0, 2))
    others = [small(0, 1, (0, 2)), small(0, 0, (1, 2)), small(1, 0, (0, 2))]
    assert torch.equal(first, small(0, 0, (0, 2)))
    for other in others:
        assert not torch.equal(first, other)
    assert torch.allclose(first / small(0, 0, (0, 2), 1e-5), torch.tensor(10.0))


@pytest.mark.parametrize("method", METHODS)
def test_class_images_are_off_in_this_stage_and_refused_with_a_sentence(method, tmp_path):
    assert settings_for(None, method).prior_weight == 1
    assert settings_for(None, method, stage="super_resolution").prior_weight == 0
    with pytest.raises(ValueError, match=r"prior_weight=1 needs class images, and an up-scaler draws none .* Fix: "):
        settings_for(None, method, stage="super_resolution", prior_weight=1.0)
    real = settings_for(None, method, stage="super_resolution", prior_weight=1.0, prior_folder=str(tmp_path))
    assert real.prior_weight == 1
    with pytest.raises(ValueError, match="noise_level is a variance"):
        settings_for(None, method, stage="super_resolution", noise_level=20.0)


@pytest.mark.slow
def test_real_class_images_are_enlarged_too(model, tmp_path):
    for i, pixels in enumerate(pictures(2, seed=52)):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    given = STAGE | dict(prior_weight=1.0, prior_folder=str(tmp_path))
    trainer = Trainer(model, "dreambooth_lora", pictures(), **given)
    objective = trainer.objective()
    batch = objective.batch(0, 0)
    _, parts = objective.loss(batch, 0)
    trainer.learner.restore()
    assert len(batch.small) == 2 and "prior" in parts


def test_wrong_models_are_refused_before_any_work(model):
    tiny = load_model("tiny")
    with pytest.raises(ValueError, match="not an up-scaler"):
        Trainer(tiny, "dreambooth", pictures(), **STAGE).train()
    with pytest.raises(ValueError, match="not an up-scaler"):
        upscale(tiny, small_pictures())
    with pytest.raises(ValueError, match="stage='super_resolution'"):
        Trainer(model, "textual_inversion", pictures(), class_word="mug").train()
    with pytest.raises(ValueError, match="Fix: pcs upscale"):
        sample(model, "a mug", steps=1)


def test_what_upscale_cannot_take_is_one_sentence(model):
    good = small_pictures()
    for pictures_, prompts, options, sentence in (
        ([], None, {}, "pictures is empty"),
        ([good[0].astype(float)], None, {}, r"picture 0 must be .* not float64 \[16, 16, 3\]"),
        ("small.png", None, {}, "not str"),
        ([good[0], good[1][:12]], None, {}, "12 x 16 and 16 x 16"),
        (good, ["one"], {}, "1 prompts and 2 pictures"),
        (good, None, {"noise_level": 20}, "noise_level is a variance"),
    ):
        with pytest.raises(ValueError, match=sentence):
            upscale(model, pictures_, prompts, steps=1, **options)


@pytest.mark.slow
def test_a_run_teaches_and_its_file_enlarges(model, learned):
    concept = load_concept(learned / "concept.safetensors", model)
    small = small_pictures()
    options = dict(steps=3, noise_level=1e-5, guidance=2)
    large = upscale(model, small, None, concept, **options)
    assert [p.size for p in large] == [(64, 64)] * 2
    assert apart(large, upscale(model, small, concept.instance_prompt, [concept], **options, batch=1)) < 0.01
    assert apart(large, upscale(model, small, concept.instance_prompt, **options)) > 0.02
    # the concept's own noise is the default, and another one changes the picture
    assert apart(large, upscale(model, small, None, concept, steps=3, guidance=2)) == 0
    assert apart(large, upscale(model, small, None, concept, steps=3, guidance=2, noise_level=0.1)) > 0.01


def test_levels_and_variances(model):
    schedule = model.low_res_schedule
    assert [level_of(schedule, variance_at(schedule, level)) for level in (0, 20, 999)] == [0, 20, 999]
    assert level_of(schedule, 1e-5) == level_of(schedule, 0.0) == 0
    assert variance_at(schedule, level_of(schedule, 1e-3)) == pytest.approx(
        1e-3, rel=0.11
    )  # levels are 2e-4 apart there


@pytest.mark.slow
def test_the_exported_pipeline_draws_the_same_in_diffusers(model, learned, tmp_path):
    """The pipeline has another scaling factor than the model: the autoencoder it writes makes up for it."""
    from diffusers import DDIMScheduler, StableDiffusionUpscalePipeline

    concept = load_concept(learned / "concept.safetensors", model)
    before = float(model.vae.config.scaling_factor)
    report = export(concept, tmp_path / "pipe", "pipeline", model)
    assert "call it with noise_level=0" in str(report)
    assert float(model.vae.config.scaling_factor) == before != 0.08333
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionUpscalePipeline" and index["max_noise_level"] == 350
    pipe = StableDiffusionUpscalePipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    small, prompts = small_pictures(), [concept.instance_prompt] * 2
    for level in (0, 20):
        theirs = pipe(
            prompts,
            [Image.fromarray(p) for p in small],
            num_inference_steps=4,
            guidance_scale=3.0,
            noise_level=level,
            negative_prompt=[""] * 2,
            generator=[torch.Generator().manual_seed(5 + i) for i in range(2)],
        ).images
        options = dict(steps=4, guidance=3.0, noise_level=variance_at(model.low_res_schedule, level), seed=5)
        assert apart(theirs, upscale(model, small, None, concept, **options)) <= 1.01 / 255  # one level of rounding
        assert apart(theirs, upscale(model, small, prompts, **options)) > 0.02
    again = load_model(tmp_path / "pipe")
    assert again.upscales and apart(theirs, upscale(again, small, prompts, **options)) <= 1.01 / 255


def test_an_autoencoder_that_cannot_take_up_the_pipelines_scaling_is_refused():
    from diffusers import AutoencoderKL

    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "use_quant_conv": False, "use_post_quant_conv": False}
    with pytest.raises(ValueError, match=r"scales its latents by 0.18215 and has no 1x1 convolutions"):
        _rescaled(AutoencoderKL(**sizes))


@pytest.mark.slow
def test_a_small_up_scaler_of_the_tiny_world_is_trained_and_enlarges(tmp_path):
    first = UNet.from_config(CONFIG)
    unet = train_upscaler(tmp_path, minutes=1e-4, pictures=4)
    assert sum(p.numel() for p in unet.parameters()) == sum(p.numel() for p in first.parameters()) < 1_000_000
    small_upscaler(tmp_path / "x4", unet)
    (large,) = upscale(load_model(tmp_path / "x4"), small_pictures(1), "a mug", steps=1, noise_level=1e-5)
    assert large.size == (64, 64)
    again = train_upscaler(tmp_path, minutes=1e-4, pictures=4)  # the minutes are spent: nothing is trained on
    assert all(torch.equal(p, q) for p, q in zip(unet.parameters(), again.parameters(), strict=True))


@pytest.mark.slow
def test_the_planner_counts_an_up_scaler_whose_attention_reads_the_text_twice(model):
    found = plan(model, "dreambooth_lora", batch=1, stage="super_resolution")
    assert found.prior == 0 and found.peak > 0
    assert not found.components["cached text"]  # its residuals change the keys and values
    frozen = plan(model, "personalized_residuals", batch=1)
    tokens, projections = model.tokenizer.model_max_length, model.unet.text_projections()
    widths = [model.unet.get_submodule(name).out_features for name in projections]
    assert len(projections) > 2 * len(model.unet.attention_names())
    assert frozen.components["cached text"] == 2 * tokens * sum(widths)  # bfloat16


@pytest.mark.slow
def test_from_the_command_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"mug-{i}.png")
    train = f"train photos --class mug --model {folder} --method dreambooth --set stage=super_resolution --steps 2"
    train += " --dtype float32"
    assert cli.main([*train.split(), "--out", "details", "--preview", "a {}"]) == 0
    shown = capsys.readouterr()
    assert f"use it: pcs upscale PICTURE --concept details --model {folder}" in shown.err
    assert "preview failed" not in shown.err and list((tmp_path / "details" / "samples").glob("*.png"))
    assert "Reduced" in (tmp_path / "details" / "report.html").read_text()
    draw = f"upscale photos/mug-0.png photos/mug-1.png --concept details --model {folder} --steps 2 --size 64"
    assert cli.main(draw.split()) == 0
    files = capsys.readouterr().out.split()
    assert len(files) == 2 and [size_of(f) for f in files] == [(64, 64)] * 2
    assert cli.main([*draw.split(), "--size", "66"]) == 2
    assert "--size must be a multiple of 4" in capsys.readouterr().err
    assert cli.main([*train.split(), "--out", "more", "--prior-weight", "1"]) == 1
    assert "prior_weight=0" in capsys.readouterr().err and not (tmp_path / "more" / "concept.safetensors").exists()
    assert cli.main(["upscale", "photos"]) == 2
    assert "--model stabilityai/stable-diffusion-x4-upscaler" in capsys.readouterr().err
    assert cli.main(["sample", "a {}", "--concept", "details", "--model", str(folder)]) == 1
    assert "pcs upscale" in capsys.readouterr().err
    assert cli.main(f"export details --model {folder} --format pipeline --out pipe".split()) == 0
    assert (tmp_path / "pipe" / "low_res_scheduler" / "scheduler_config.json").is_file()
