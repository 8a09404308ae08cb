"""Sampling as the references sample: presets by name, LAG's options, guidance, what is clipped, SDXL's autoencoder."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
from pcs_trainer import load_model, sample
from pcs_trainer.cli.commands import command
from pcs_trainer.cli.commands.common import lag_of
from pcs_trainer.cli.commands.sample import fill_in
from pcs_trainer.cli.config import effective
from pcs_trainer.cli.options import parse
from pcs_trainer.errors import UsageError
from pcs_trainer.model.autoencoder import decode, encode_images
from pcs_trainer.model.schedule import Schedule
from pcs_trainer.sampling.drawing import SampleOptions
from pcs_trainer.sampling.samplers import SAMPLERS
from test_model_loading import write_model
from test_text_encoder_training import sdxl
from unet_families import relative

__all__ = ["sdxl"]


def given(*words, name="sample"):
    chosen = command(name)
    return effective(chosen, parse(chosen, list(words)))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), (25, None, "ddim", 0.0)),
        (("--preset", "custom_diffusion"), (100, 6.0, "ddim", 1.0)),
        (("--preset", "custom_diffusion", "--steps", "200"), (200, 6.0, "ddim", 1.0)),
        (("--preset", "custom_diffusion", "--sampler", "euler"), (100, 6.0, "euler", 0.0)),
        (("--preset", "textboost"), (25, 7.5, "dpmpp_2m", 0.0)),
    ],
)
def test_a_preset_fills_what_the_flags_leave_open(words, expected):
    options = given("a dog", *words)
    fill_in(options)
    assert (options.steps, options.guidance, options.sampler, options.eta) == expected


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_lags_options_are_within_reach(name):
    flags = ["--lag", "--lag-uncond", "zero", "--lag-start", "0.2", "--lag-stop", "0.8", "--lag-soft"]
    found = lag_of(given("x", *flags, name=name))
    assert (found.uncond, found.start, found.stop, found.soft) == ("zero", 0.2, 0.8, True)
    assert lag_of(given("x", name=name)) is False and lag_of(given("x", "--lag", name=name)).uncond == "reuse"
    with pytest.raises(UsageError, match="--lag-soft applies to LAG sampling; add --lag"):
        lag_of(given("x", "--lag-soft", name=name))
    with pytest.raises(UsageError, match=r"--lag-start 0\.9 must be less than --lag-stop 0\.5"):
        lag_of(given("x", "--lag", "--lag-start", "0.9", "--lag-stop", "0.5", name=name))


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_the_words_of_lags_masks_are_within_reach(name):
    def found(*texts):
        return lag_of(given("x", "--lag", *(w for text in texts for w in ("--lag-token", text)), name=name))

    assert found().tokens is None and found("mug", "<mug>").tokens == ["mug", "<mug>"]
    several = found("<mug>=mug", "<dog>=dog", "<mug>=handle")
    assert several.tokens == {"<mug>": ["mug", "handle"], "<dog>": ["dog"]}
    assert several.words_of("<mug>") == ["mug", "handle"] and several.words_of("<cat>") is None
    for texts, says in (
        (("mug", "<a>=b"), "each word with the token of its concept, TOKEN=WORD, or none"),
        (("=mug",), "expected a word, or a concept's token=word, got '=mug'"),
        ((" ",), "expected a word, or a concept's token=word, got ' '"),
    ):
        with pytest.raises(UsageError, match=says):
            found(*texts)
    with pytest.raises(UsageError, match="--lag-token applies to LAG sampling; add --lag"):
        lag_of(given("x", "--lag-token", "mug", name=name))


def test_ddim_clips_nothing_that_its_file_does_not_ask_for():
    """A folder saved with another scheduler says nothing of clip_sample; latents are not within 1."""
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading"}
    noise = torch.full((1, 4, 2, 2), 3.0)

    def drawn(**more):
        schedule = Schedule.from_config(config | more | {"prediction_type": "sample"})
        return SAMPLERS["ddim"](lambda x, t: torch.full_like(x, 3.0), schedule, 5, noise, torch.Generator())

    assert float(drawn().max()) > 2.5 and torch.equal(drawn(), drawn(clip_sample=False))
    assert float(drawn(clip_sample=True).max()) < 1.5


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def written(request, tmp_path_factory):
    """A model's folder, and diffusers' parts of it."""
    import transformers

    root = write_model(tmp_path_factory.mktemp("offset") / request.param, request.param)
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    kinds |= {"text_encoder": transformers.CLIPTextModel, "tokenizer": transformers.CLIPTokenizer}
    return root, {name: kind.from_pretrained(root / name) for name, kind in kinds.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # diffusers says that the file is outdated
@pytest.mark.parametrize("said", [{"steps_offset": 0, "clip_sample": True}, {}], ids=["other values", "nothing"])
def test_a_scheduler_file_is_read_as_diffusers_pipeline_reads_it(written, said):
    """StableDiffusionPipeline sets an offset of 1 and no clipping, whichever scheduler it is given."""
    root, parts = written
    file = root / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({n: v for n, v in config.items() if n not in ("steps_offset", "clip_sample")} | said))
    model, noise = load_model(root), torch.randn(1, 4, 16, 16)
    kinds = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}
    for name, kind in (kinds | {"dpmpp_2m": diffusers.DPMSolverMultistepScheduler}).items():
        pipeline = diffusers.StableDiffusionPipeline(
            **parts,
            scheduler=kind.from_pretrained(root / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 3, "guidance_scale": 4.0, "latents": noise, "output_type": "latent"}
        expected = pipeline("a b c", height=32, width=32, **options).images
        options = {"steps": 3, "guidance": 4.0, "latents": noise, "size": 32, "return_latents": True}
        drawn = sample(model, ["a b c"], sampler=name, **options)[1]
        assert float(expected.abs().max()) > 1 and relative(drawn, expected) < 1e-4, name


def test_sdxls_scheduler_file_is_read_as_it_is(sdxl, written):
    """As its pipeline does; the file that diffusers writes by default says 0, and clips."""
    assert (sdxl.schedule.config["steps_offset"], sdxl.schedule.config["clip_sample"]) == (0, True)
    model = load_model(written[0])
    assert (model.schedule.config["steps_offset"], model.schedule.config["clip_sample"]) == (1, False)
    assert model.loaded == ["schedule"]


def test_sdxls_guidance_is_its_pipelines(sdxl, model):
    assert SampleOptions().guidance_for(sdxl) == 5.0 == SampleOptions().guidance_for(model)
    assert SampleOptions(guidance=3.0).guidance_for(sdxl) == 3.0


class Overflows(torch.nn.Module):
    """An autoencoder whose activations pass float16's range, as SDXL's do."""

    def __init__(self, vae):
        super().__init__()
        self.vae, self.config = vae, vae.config
        self.seen = []

    def encode(self, x):
        self.seen.append(x.dtype)
        return self.vae.encode(x * 70000 / 70000 if x.dtype == torch.float32 else x * 70000)

    def decode(self, z):
        self.seen.append(z.dtype)
        return self.vae.decode(z * 70000 / 70000 if z.dtype == torch.float32 else z * 70000)


def test_sdxls_autoencoder_computes_in_float32_where_it_asks_to(sdxl):
    pictures = [np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)]
    before = encode_images(sdxl, pictures)
    kept = sdxl.vae
    try:
        for dtype, in_32 in ((torch.float16, 2), (torch.bfloat16, 1)):
            sdxl.release("vae")
            vae = Overflows(sdxl.vae.to(dtype))
            sdxl._parts["vae"] = vae
            weights = {n: p.clone() for n, p in vae.named_parameters()}
            moments = encode_images(sdxl, pictures)
            torch.testing.assert_close(moments.mean, before.mean, rtol=0.1, atol=0.1)
            if dtype == torch.float16:
                assert len(decode(sdxl, moments.mean)) == 1
                assert vae.seen.count(torch.float32) == in_32
            assert vae.seen[0] == torch.float32 and all(torch.equal(weights[n], p) for n, p in vae.named_parameters())
    finally:
        sdxl._parts["vae"] = kept


def test_dreambenchs_prompts_are_known_by_name():
    """25 for things and 25 for animals: fifteen are the same."""
    from pcs_trainer.cli.commands.evaluate import PROMPT_SETS, check
    from pcs_trainer.evaluation.prompts import SETS, asks_for

    assert tuple(SETS) == PROMPT_SETS
    things, animals = SETS.values()
    assert len(set(things)) == len(set(animals)) == 25 and len(set(things) & set(animals)) == 15
    assert [a.prompt for a in asks_for(None, things)] == list(things)
    options = given("x", "--photos", ".", "--prompts", "dreambench-live", "--prompt", "a {}", name="evaluate")
    options.concept = ["x"]
    with pytest.raises(UsageError, match="not both"):
        check(options)
