"""Every method trains on each family: noise prediction, linear projections, SDXL's two encoders, up-scalers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from every_case import EVERY_CASE
from pcs_trainer import load_model
from pcs_trainer.concept.loading import load_concept
from pcs_trainer.errors import UnsupportedModel
from pcs_trainer.methods import TITLES
from pcs_trainer.sampling.drawing import sample
from pcs_trainer.training.trainer import Trainer
from test_model_loading import text_config, write_model
from trainer_cases import small_for

pytestmark = pytest.mark.slow
SETTINGS = dict(
    class_word="b", token="<v>", template="{subject}", class_template="{class}", init_word="b", identifier="learned",
    resolution=32, steps=2, batch=1, prior_images=1, prior_steps=1,
)  # fmt: skip
# A word alone, trained for two steps, draws what its start draws on random networks; the test wants a difference.
METHODS = tuple(name for name in TITLES if name != "textual_inversion")
# SDXL asks most of a method: two encoders, pooled text, linear projections. SD1.x is the embedded model's family, which
# all methods train everywhere else; SD2.x differs from it in the prediction and in the projections' shape.
BY_DEFAULT = {"sd1": ("personalized_residuals",), "sd2": ("dreambooth", "dreambooth_lora", "textboost")}


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def model(request, tmp_path_factory):
    root = write_model(tmp_path_factory.mktemp("model") / request.param, request.param)
    if request.param == "sdxl":  # the two encoders' states stand side by side
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        half = text_config()
        half.hidden_size = 12
        CLIPTextModel(half).save_pretrained(root / "text_encoder")
        CLIPTextModelWithProjection(half).save_pretrained(root / "text_encoder_2")
    return load_model(root)


def pictures():
    return list(np.random.default_rng(0).integers(0, 255, (2, 40, 48, 3), dtype=np.uint8))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_saves_and_draws(request, model, method, tmp_path, monkeypatch):
    if not EVERY_CASE and method not in BY_DEFAULT.get(request.node.callspec.params["model"], METHODS):
        pytest.skip("another method goes the same way on this family: PCS_EVERY_CASE=1")
    monkeypatch.setenv("PCS_CACHE", str(tmp_path / "cache"))
    events = []
    concept = Trainer(
        model, method, pictures(), out=tmp_path / "out", **SETTINGS | small_for(method, augment=False)
    ).train(on_event=events.append)
    assert [e.kind for e in events if e.kind in ("step", "done")] == ["step", "step", "done"]
    assert len(concept.words["<v>"]) == len(model.text_encoders)
    loaded = load_concept(tmp_path / "out" / "concept.safetensors", model)
    with_it, without = (
        sample(model, ["a <v>"], c, steps=2, size=32, words=w, return_latents=True)[1]
        for c, w in (([loaded], None), ([], concept.words))
    )
    assert not torch.equal(with_it, without)


@pytest.mark.parametrize("family", ["low resolution", "up-scaler"])
def test_an_upscaler_is_told_the_small_picture(family, tmp_path, monkeypatch):
    """DreamBooth's super-resolution stage: seven input channels, a noise level, and it trains."""
    monkeypatch.setenv("PCS_CACHE", str(tmp_path / "cache"))
    model = load_model(write_model(tmp_path / "model", family))
    chosen = SETTINGS
    concept = Trainer(model, "dreambooth", pictures(), stage="super_resolution", **chosen).train()
    assert concept.tensors["unet.conv_in.weight"].shape[1] == 7
    with pytest.raises(ValueError, match="super_resolution"):
        Trainer(model, "dreambooth", pictures(), **chosen).train()
    if family == "low resolution":  # which knows ten levels
        with pytest.raises(ValueError, match=r"level \d+ of .*, whose UNet knows levels below 10. Fix: noise_level="):
            Trainer(model, "dreambooth", pictures(), stage="super_resolution", **chosen, noise_level=0.1).train()
    (tmp_path / "model" / "low_res_scheduler" / "scheduler_config.json").unlink()
    (tmp_path / "model" / "low_res_scheduler").rmdir()
    with pytest.raises(UnsupportedModel, match="has no folder 'low_res_scheduler'"):
        Trainer(load_model(tmp_path / "model"), "dreambooth", pictures(), stage="super_resolution", **chosen).train()
