"""Samplers against diffusers' schedulers; sample(): batches, seeds, guidance, several concepts in one batch."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import diffusers
import numpy as np
import pytest
import torch
from pcs_trainer import load_model
from pcs_trainer.concept.concept import Concept
from pcs_trainer.model.schedule import Schedule
from pcs_trainer.model.sources import TINY
from pcs_trainer.sampling import SampleOptions, draw, make_scene, samplers
from pcs_trainer.sampling.drawing import sample
from test_model_loading import text_config, write_model
from unet_families import SMALL, ours_like, peer, relative

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SCHEDULES = {
    "sd1": BETAS | {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
    "sd2": BETAS
    | {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "prediction_type": "v_prediction"},
    "tiny": BETAS
    | {"beta_end": 0.02, "timestep_spacing": "trailing", "steps_offset": 1, "set_alpha_to_one": True}
    | {"prediction_type": "v_prediction"},
    "linspace": BETAS | {"timestep_spacing": "linspace"},
    "each class's defaults": {"beta_schedule": "scaled_linear"},
    "zero terminal": BETAS | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    | {"prediction_type": "v_prediction"},
    "karras": BETAS | {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1},
    "last sigma": BETAS | {"final_sigmas_type": "sigma_min"},
}  # fmt: skip
PEERS = {
    "ddim": diffusers.DDIMScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(3)
    small = SMALL | {"layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 4}
    small |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    small |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    return ours_like(peer(small)).requires_grad_(False)


def predictor(unet):
    context = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(9))
    kv = unet.text_kv(context)
    return lambda x, t: unet(x, torch.as_tensor(t).expand(len(x)), kv)


def peer_latents(kind, config, predict, steps, noise, seed, **options):
    """diffusers' own loop."""
    scheduler = kind.from_config(config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    takes_generator = kind in (PEERS["ddim"], PEERS["euler_ancestral"])
    more = options | ({"generator": generator} if takes_generator else {})
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x, **more).prev_sample
    return x


@pytest.mark.slow
@pytest.mark.parametrize("steps", [7, 16])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("name", list(PEERS))
@torch.no_grad()
def test_a_sampler_ends_where_diffusers_scheduler_does(unet, name, schedule, steps):
    config = SCHEDULES[schedule]
    if name == "ddim":  # as diffusers' pipelines: latents are clipped only where a scheduler file asks for it
        config = {"clip_sample": False} | config
    if name == "euler_ancestral" and "use_karras_sigmas" in config:
        pytest.skip("diffusers' scheduler of that name has no such setting")
    predict, noise = predictor(unet), torch.randn(2, 4, 8, 8)
    for eta in (0.0, 0.7) if name == "ddim" else (None,):
        options = {} if eta is None else {"eta": eta}
        expected = peer_latents(PEERS[name], config, predict, steps, noise, 5, **options)
        generator = torch.Generator().manual_seed(5)
        sampler = samplers.SAMPLERS[name]
        actual = sampler(predict, Schedule.from_config(config), steps, noise, generator, **options)
        assert relative(expected, noise) > 0.1
        assert relative(actual, expected) < 1e-4


@pytest.fixture(scope="module")
def tiny():
    model = load_model("tiny", dtype=torch.float32)
    model.unet.set_plan("eager")
    return model


def made_up_concept(
    model, token: str, seed: int, rank: int = 2, only: str = "proj_out", method: str = "test"
) -> Concept:
    """Random low-rank residuals large enough to show, and one row for the word."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.unet.named_modules():
        if name.endswith(only):
            c_out, c_in = module.weight.shape[:2]
            tensors[f"unet.{name}.down"] = torch.randn(rank, c_in, generator=generator) * c_in**-0.5
            tensors[f"unet.{name}.up"] = torch.randn(c_out, rank, generator=generator) * 0.2
    table = model.text_encoder.get_input_embeddings().weight
    row = table.std() * torch.randn(1, table.shape[1], generator=generator)
    return Concept(method, tensors, {token: [row]}, {"token": token, "class_word": "dog"})


def latents_of(model, prompts, *args, **options):
    settings = {"steps": 3, "return_latents": True} | options
    return sample(model, prompts, *args, **settings)[1]


class Counted:
    """Counts the UNet's evaluations and the rows of each."""

    def __init__(self, unet) -> None:
        self.rows: list[int] = []
        self.handle = unet.register_forward_pre_hook(lambda _m, args: self.rows.append(len(args[0])))

    def __enter__(self) -> list[int]:
        return self.rows

    def __exit__(self, *error) -> None:
        self.handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("negative", ["", "a blue cup"])
def test_a_call_draws_what_diffusers_pipeline_draws(tiny, negative):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a red dog on the beach", "a green cup"]
    noise = torch.cat([torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(40 + i)) for i in range(2)])
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "latents": noise, "output_type": "np"}
    expected = pipeline(prompts, negative_prompt=[negative] * 2, height=64, width=64, **options).images
    images = sample(tiny, prompts, negative=negative, steps=4, seed=40)
    assert [image.size for image in images] == [(64, 64)] * 2
    actual = np.stack([np.asarray(image) for image in images]) / 255
    assert np.abs(actual - expected).max() < 1.01 / 255
    assert torch.equal(latents_of(tiny, prompts, seed=40), latents_of(tiny, prompts, latents=noise))


@pytest.mark.slow
def test_sdxl_draws_what_diffusers_pipeline_draws(tmp_path):
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    root = write_model(tmp_path / "xl", "sdxl")
    half = text_config()
    half.hidden_size = 12
    CLIPTextModel(half).save_pretrained(root / "text_encoder")
    CLIPTextModelWithProjection(half).save_pretrained(root / "text_encoder_2")
    classes = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    classes |= {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer"}
    parts = {name: ["transformers", kind] for name, kind in classes.items()}
    parts |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    parts |= {"scheduler": ["diffusers", "DDIMScheduler"], "_class_name": "StableDiffusionXLPipeline"}
    (root / "model_index.json").write_text(json.dumps(parts))
    pipeline = StableDiffusionXLPipeline.from_pretrained(root)
    pipeline.set_progress_bar_config(disable=True)
    model = load_model(root)
    prompts, noise = ["a b c", "d"], torch.randn(2, 4, 16, 16)
    for negative in ([None, ""], ["b", "b"]):
        expected = pipeline(
            prompts,
            negative_prompt=negative[0] and [negative[0]] * 2,
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_scale=4.0,
            latents=noise,
            output_type="latent",
        ).images
        options = {"negative": negative[1], "guidance": 4.0, "latents": noise, "size": 32}
        assert relative(latents_of(model, prompts, **options), expected) < 1e-4


@pytest.mark.slow
def test_a_picture_does_not_depend_on_its_batch(tiny):
    prompts = ["a red dog", "a cup", "a blue dog on the beach"]
    for sampler in ("ddim", "euler_ancestral"):
        options = {"sampler": sampler, "eta": 0.5 if sampler == "ddim" else 0.0}
        together = latents_of(tiny, prompts, seed=7, **options)
        apart = latents_of(tiny, prompts, seed=7, batch=2, **options)
        assert relative(apart, together) < 1e-4
        assert relative(latents_of(tiny, prompts[2], seed=9, **options), together[2:]) < 1e-4
        assert relative(latents_of(tiny, prompts[2], seed=8, **options), together[2:]) > 0.1


def test_guidance_is_one_batch_and_none_of_it_half(tiny):
    with Counted(tiny.unet) as rows:
        guided = latents_of(tiny, ["a dog", "a cup"])
        assert rows == [4] * 3
        rows.clear()
        plain = latents_of(tiny, ["a dog", "a cup"], guidance=1.0)
        assert rows == [2] * 3
    assert relative(plain, guided) > 0.05
    negatives = ["a cup", "a dog"]
    both = latents_of(tiny, ["a dog", "a cup"], negative=negatives)
    alone = latents_of(tiny, "a cup", negative="a dog", seed=1)
    assert relative(alone, both[1:]) < 1e-4


def test_a_callback_sees_every_step_and_can_end_the_call(tiny):
    seen = []
    images = sample(tiny, ["a dog"] * 3, steps=2, batch=2, on_step=lambda *call: seen.append(call))
    assert len(images) == 3
    assert [call[:2] for call in seen] == [(i, 4) for i in range(4)]
    assert [len(call[2]) for call in seen] == [2, 2, 1, 1]
    seen.clear()

    def stop(step, steps, latents):
        seen.append(step)
        return step < 2

    images, latents = sample(tiny, ["a dog"] * 3, steps=2, batch=2, on_step=stop, return_latents=True)
    assert (len(images), len(latents), seen) == (2, 2, [0, 1, 2])
    images, maps, latents = sample(
        tiny, "a dog", steps=2, on_step=lambda *_: False, return_latents=True, return_maps=["dog"]
    )
    assert (images, len(latents), maps.tokens) == ([], 0, [])


def test_concepts_leave_the_model_as_it_was(tiny):
    concept = made_up_concept(tiny, "<one>", 1)
    before = latents_of(tiny, "a photo of a dog")
    strong = latents_of(tiny, "a photo of a dog", concept)
    weak = latents_of(tiny, "a photo of a dog", concept, strengths=[0.1])
    assert 0 < relative(weak, before) < relative(strong, before)
    assert torch.equal(latents_of(tiny, "a photo of a dog"), before)


@pytest.mark.slow
def test_whole_weights_of_one_concept_after_another(tiny):
    """Every projection exchanged, several times over: no packed copy of an earlier concept is left."""
    parameters = dict(tiny.unet.named_parameters())
    chosen = [n for n in parameters if n.endswith(("proj_out.weight", "to_out.0.weight", "attn2.to_k.weight"))]

    def concept(seed):
        generator = torch.Generator().manual_seed(seed)
        values = {n: parameters[n] + 0.05 * torch.randn(parameters[n].shape, generator=generator) for n in chosen}
        return Concept("whole", {f"unet.{n}": v for n, v in values.items()}, {}, {"token": f"w{seed}"})

    drawn = [latents_of(tiny, "a dog", concept(seed), steps=1) for seed in range(5)]
    for seed, expected in enumerate(drawn):
        fresh = load_model("tiny", dtype=torch.float32)
        for name, value in concept(seed).tensors.items():
            fresh.unet.get_parameter(name.removeprefix("unet.")).data.copy_(value)
        assert relative(latents_of(fresh, "a dog", steps=1), expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_each_prompt_with_a_concept_of_its_own_in_one_batch(tiny, lag, guidance):
    """Residuals of several ranks, on keys and values of the text too, and residuals on the text encoder."""
    one, two = made_up_concept(tiny, "<one>", 1), made_up_concept(tiny, "<two>", 2, rank=3)
    three = made_up_concept(tiny, "<two>", 3, only="attn2.to_k")
    encoder = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    width = tiny.text_encoder.get_input_embeddings().weight.shape[1]
    deep = tiny.text_encoder.config.intermediate_size
    three.tensors |= two.tensors
    three.tensors |= {f"{encoder}.down": torch.randn(2, width) * 0.2, f"{encoder}.up": torch.randn(deep, 2) * 0.3}
    prompts = ["a <two> dog on the beach", "a <one> dog", "a dog", "a <two> dog", "a <one> dog in the snow"]
    concepts, index, strengths = [one, two, three], [1, 0, None, 2, 0], [1.0, 0.7, 1.2]
    options = {"guidance": guidance, "strengths": strengths, "lag": lag, "seed": 5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Counted(tiny.unet) as rows:
            together = latents_of(tiny, prompts, concepts, index=index, **options)
            assert rows == [5 if guidance == 1.0 else 10] * 3
        for i, k in enumerate(index):
            own = {"strengths": [strengths[k]], "lag": lag} if k is not None else {"strengths": [], "lag": False}
            alone = latents_of(tiny, prompts[i], [] if k is None else concepts[k], **(options | own | {"seed": 5 + i}))
            assert relative(together[i : i + 1], alone) < 1e-4, (i, k)
    assert not any(getattr(m, "residuals", None) for m in tiny.unet.modules())


def test_names_of_samplers_and_of_memory_plans_are_read_without_torch():
    code = "import sys; from pcs_trainer.sampling import NAMES; from pcs_trainer.unet import PLAN_NAMES, short_plan; "
    code += "assert short_plan('rebuild_all') == 'checkpoint'; print(*NAMES); sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == list(samplers.SAMPLERS) == list(PEERS)


def test_a_call_is_a_scene_drawn_with_options(tiny):
    concept = made_up_concept(tiny, "<one>", 1)
    prompts = ["a <one> dog", "a <one> dog on the beach"]
    images, maps, latents = sample(
        tiny, prompts, concept, steps=2, seed=4, guidance=3.0, lag=True, return_maps=["dog"], return_latents=True
    )
    scene = make_scene(tiny, prompts, concept, None, None, None, None)  # no negative prompts are empty ones
    drawn = draw(scene, SampleOptions(steps=2, seed=4, guidance=3.0, lag=True, maps=["dog"]))
    assert torch.equal(drawn.latents, latents) and torch.equal(drawn.maps.mean, maps.mean)
    assert [np.array_equal(a, b) for a, b in zip(drawn.images, images, strict=True)] == [True, True]
    with Counted(tiny.unet) as rows:  # without guidance, negative prompts are not read
        plain = draw(make_scene(tiny, prompts, concept, None, "a cup", None, None), SampleOptions(steps=1, guidance=1))
    assert rows == [2] and plain.maps.tokens == []
    assert torch.equal(plain.latents, latents_of(tiny, prompts, concept, steps=1, guidance=1))


def test_bad_calls_are_refused_in_one_sentence(tiny):
    concept = made_up_concept(tiny, "<one>", 1)
    whole = Concept("custom_diffusion", {"unet.conv_in.weight": tiny.unet.conv_in.weight.clone()}, {}, {"token": "<w>"})
    for arguments, options, sentence in (
        (["a dog"], {"sampler": "ddpm"}, "choose one of ddim, dpmpp_2m, euler, euler_ancestral"),
        (["a dog"], {"sampler": "euler", "eta": 0.5}, "eta belongs to the sampler 'ddim'"),
        (["a dog"], {"steps": 0}, "steps must be from 1 to 1000"),
        (["a dog"], {"batch": 0}, "batch must be at least 1, not 0"),
        (["a dog"], {"size": 50}, "size must be multiples of 4 pixels for this model, not 50 x 50"),
        (["a dog"], {"latents": torch.zeros(1, 4, 16, 16)}, r"latents must be the initial noise \[1, 8, 16, 16\]"),
        (["a dog"], {"negative": ["a", "b"]}, "2 negative prompts and 1 prompts"),
        ([[]], {}, "prompts is empty"),
        (["a dog", concept], {"strengths": [1, 2]}, "1 concepts and 2 strengths"),
        (["a dog", concept], {"index": [0, 0]}, "index names a concept for 2 prompts; there are 1"),
        (["a dog", concept], {"index": [1]}, "index holds 1; with 1 concepts"),
        (
            ["a dog", [concept, whole]],
            {"index": [1]},
            "'<w>' \\(custom_diffusion\\) changes the whole of 'unet.conv_in",
        ),
        (["a dog"], {"return_maps": ["cup"]}, "no prompt has the word 'cup'"),
        (["a dog"], {"return_maps": True}, "return_maps=True shows the concepts' words"),
        (["a dog"], {"latents": torch.full((1, 8, 16, 16), torch.nan)}, r"picture 0 \('a dog'\) became NaN"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sample(tiny, *arguments, **({"steps": 1} | options))
    with pytest.raises(ValueError, match="use_beta_sigmas = True is not supported"):
        samplers.euler(None, Schedule.from_config(BETAS | {"use_beta_sigmas": True}), 2, torch.zeros(1))
