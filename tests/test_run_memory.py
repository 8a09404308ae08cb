"""What a run holds beside its steps: the check before them, previews, class images, and how it ends."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pcs_trainer.concept.attach import in_place, predict
from pcs_trainer.concept.loading import load_concept
from pcs_trainer.data.batches import Batch
from pcs_trainer.data.prior import draw_prior
from pcs_trainer.files import write_safetensors
from pcs_trainer.model.autoencoder import decode, encode_images
from pcs_trainer.model.model import load_model
from pcs_trainer.training import float16
from pcs_trainer.training import run as running
from pcs_trainer.training import trainer as training
from pcs_trainer.training.objective import Objective
from PIL import Image
from safetensors.torch import load_file
from trainer_cases import cache, trainer

__all__ = ["cache"]


def test_the_batch_of_the_proof_is_cut_to_where_the_mask_is():
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, 0, 50:, 40:44] = 1
    latents = torch.arange(2 * 4 * 64 * 64.0).view(2, 4, 64, 64)
    batch = Batch(latents, ["a", "b"], mask, -latents, torch.tensor([1, 2]), 1)
    first = batch.smallest(32)
    assert first.latents.shape == (2, 4, 32, 32) and torch.equal(first.noise, -first.latents)
    assert first.masks is not None and first.masks[0].sum() == mask[0].sum()
    assert batch.smallest(64).latents.shape == batch.smallest(99).latents.shape == (2, 4, 64, 64)


def test_the_check_before_the_first_step_compares_at_most_32_latents_a_side(monkeypatch):
    model, sizes = load_model("tiny"), []

    def loss(objective, batch, step, micro=0):
        sizes.append(tuple(batch.latents.shape[2:]))
        return torch.ones(()), {}

    monkeypatch.setattr(Objective, "loss", loss)
    monkeypatch.setattr(training, "compare_gradients", lambda parameters, loss, *more: str(loss()))
    one = trainer(model, resolution=288, steps=1, check_backend=True, probe_every=0)
    one._check_gradients(one.objective(), lambda *told, **data: None)
    one.learner.restore()
    assert sizes == [(32, 32)]


@pytest.mark.parametrize(
    ("side", "encoded", "decoded"), [(64, [8, 2], [10]), (256, [4, 4, 2], [4, 4, 2]), (512, [1] * 10, [1] * 10)]
)
def test_the_autoencoder_takes_the_pixels_of_one_512_image_at_a_time(monkeypatch, side, encoded, decoded):
    """Eight at most are encoded together; eight of 1024 x 1024 would need 19 GB."""
    model, sizes = load_model("tiny"), []

    def encode(x):
        sizes.append(len(x))
        moments = SimpleNamespace(mean=torch.zeros(len(x), 8, 2, 2), std=torch.ones(len(x), 8, 2, 2))
        return SimpleNamespace(latent_dist=moments)

    def decode_some(z):
        sizes.append(len(z))
        return SimpleNamespace(sample=torch.zeros(len(z), 3, 4, 4))

    monkeypatch.setattr(model.vae, "encode", encode)
    monkeypatch.setattr(model.vae, "decode", decode_some)
    assert len(encode_images(model, [np.zeros((side, side, 3), np.uint8)] * 10).mean) == 10
    assert sizes == encoded
    sizes.clear()
    assert len(decode(model, torch.zeros(10, 8, side // 4, side // 4))) == 10 and sizes == decoded


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_check_without_the_memory_for_it_is_a_warning(monkeypatch, error):
    def compared(*given):
        raise error

    monkeypatch.setattr(training, "compare_gradients", compared)
    told = []
    trainer(load_model("tiny"), steps=1, check_backend=True, probe_every=0).train(told.append)
    assert any(e.kind == "warning" and "out of memory" in e.data["text"] for e in told)
    assert told[-1].kind == "done"


def test_another_error_in_the_check_ends_the_run(monkeypatch):
    def compared(*given):
        raise RuntimeError("expected scalar type Float")

    monkeypatch.setattr(training, "compare_gradients", compared)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        trainer(load_model("tiny"), steps=1, check_backend=True).train()


@pytest.mark.slow
def test_dreambooth_ends_without_what_it_trained_with(monkeypatch, tmp_path):
    """When the file is proven, the trained network, its optimizer and the concept's own copy are gone."""
    model = load_model("tiny")
    held: list[weakref.ref] = []
    seen = []

    def gone(name):
        before = getattr(running, name)

        def checked(*given):
            assert len(held) > 100 and not any(one() is not None for one in held)
            assert "unet" not in model.loaded  # neither the base's beside what was learned, nor beside the file's
            seen.append(name)
            return before(*given)

        monkeypatch.setattr(running, name, checked)

    def watch(event):
        if event.kind == "checkpoint":
            stepper = found[0]
            held.extend(weakref.ref(p) for p in stepper.parameters.values())
            states = stepper.optimizer.state.values()
            held.extend(weakref.ref(t) for s in states for t in s.values() if torch.is_tensor(t) and t.numel() > 4096)

    found = []
    made = running.Stepper.__init__
    gone("base_predicts")
    gone("file_proof")
    monkeypatch.setattr(running.Stepper, "__init__", lambda self, *given: (made(self, *given), found.append(self))[0])
    concept = trainer(model, "dreambooth", tmp_path, steps=1, probe_every=0).train(watch)
    assert seen == ["base_predicts", "file_proof"]
    kept = load_concept(tmp_path / "concept.safetensors").tensors
    assert kept.keys() == concept.tensors.keys()
    assert all(torch.equal(kept[name], t) for name, t in concept.tensors.items())


@pytest.mark.slow
def test_a_whole_network_takes_the_place_of_the_model_s_own():
    """It predicts what it predicts attached, on its own tensors, and the model is itself again afterwards."""
    model = load_model("tiny")
    concept = trainer(model, "dreambooth", steps=2, probe_every=0).train()
    before = predict(model, [], "a mug")
    attached = predict(model, [concept], concept.instance_prompt)
    with in_place(model, concept) as rest:
        assert not any(name.startswith("unet.") for name in rest.tensors)
        assert model.unet.conv_in.weight.data_ptr() == concept.tensors["unet.conv_in.weight"].data_ptr()
        assert torch.equal(predict(model, [rest], concept.instance_prompt), attached)
    assert "unet" not in model.loaded
    assert torch.equal(predict(model, [], "a mug"), before)
    part = replace(concept, tensors=dict(list(concept.tensors.items())[:3]))
    with in_place(model, part) as rest:
        assert rest is part
    assert "unet" in model.loaded


@pytest.mark.slow
def test_a_whole_network_is_drawn_by_in_the_base_s_place(tmp_path, monkeypatch):
    """By the report and by `pcs sample`: the same image as attached, without a second network."""
    from pcs_trainer.cli import entry
    from pcs_trainer.report import run_report
    from pcs_trainer.sampling import drawing

    model, drawn = load_model("tiny"), []
    concept = trainer(model, "dreambooth", tmp_path, steps=1, probe_every=0).train()
    expected = drawing.sample(model, [concept.instance_prompt], [concept], steps=2)[0]
    sample = drawing.sample

    def watched(model, prompts, concepts, **more):
        drawn.append([name for c in concepts for name in c.tensors if name.startswith("unet.")])
        return sample(model, prompts, concepts, **more)

    monkeypatch.setattr(drawing, "sample", watched)
    monkeypatch.setattr(run_report, "STEPS", 1)
    run_report._samples(model, concept, 64, lambda *told, **data: None)
    words = ["sample", concept.instance_prompt, "--concept", str(tmp_path), "--out", str(tmp_path / "out")]
    assert entry.main([*words, "--steps", "2", "--quiet"]) == 0
    assert drawn == [[], [], []]
    with Image.open(next((tmp_path / "out").glob("*.png"))) as image:
        assert image.tobytes() == expected.tobytes()
    assert entry.main([*words, "--steps", "2", "--quiet", "--strength", "0.5"]) == 0
    assert len(drawn[-1]) > 100  # between two networks: attached


@pytest.mark.slow
def test_a_concept_at_strength_0_copies_nothing():
    model = load_model("tiny")
    value = torch.randn_like(model.unet.conv_in.weight)
    concept = trainer(model, "dreambooth", steps=1, probe_every=0).train()
    concept.tensors["unet.conv_in.weight"] = value
    weight, base = model.unet.conv_in.weight, predict(model, [], "a mug")
    place, seen = weight.data_ptr(), []
    handle = model.unet.register_forward_pre_hook(lambda *_: seen.append(model.unet.conv_in.weight.data_ptr()))
    assert torch.equal(predict(model, [concept], "a mug", strength=0.0), base)
    handle.remove()
    assert seen == [place]


@pytest.mark.slow
def test_a_preview_leaves_no_more_in_memory_than_it_found():
    model, loaded = load_model("tiny"), []

    def told(event):
        if event.kind in ("step", "preview"):
            loaded.append((event.kind, set(model.loaded)))

    settings = dict(steps=2, preview_every=1, preview_prompts=("a {} here",), probe_every=0)
    trainer(model, **settings).train(told)
    assert [kind for kind, _ in loaded] == ["step", "preview"] * 2
    assert loaded[0][1] == loaded[2][1] and "text_encoders" not in loaded[2][1]


@pytest.mark.parametrize("size, batch", [(64, 8), (256, 8), (512, 2), (768, 1)])
def test_class_images_are_drawn_by_pixels(monkeypatch, size, batch):
    from pcs_trainer.methods import settings_for
    from pcs_trainer.sampling import drawing
    from PIL import Image

    asked = []

    def sample(model, prompts, **options):
        asked.append(options["batch"])
        noise = torch.randint(0, 255, (8, 8, 3), dtype=torch.uint8).numpy()
        return [Image.fromarray(noise)] * len(prompts)

    monkeypatch.setattr(drawing, "sample", sample)
    model = load_model("tiny")
    draw_prior(model, "a mug", settings_for(model, "dreambooth", class_word="mug", resolution=size, prior_images=3))
    assert asked == [batch]


def test_a_file_is_what_the_format_s_own_library_reads(tmp_path):
    strided = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
    tensors = {
        "half": torch.randn(5).bfloat16(),
        "strided": strided,
        "turned": torch.arange(6).view(2, 3).T,
        "nothing": torch.zeros(0, 3),
        "one": torch.tensor(True),
        "byte": torch.arange(3, dtype=torch.uint8),
    }
    path = write_safetensors(tmp_path / "x.safetensors", tensors, {"what": "naïve"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())
    from pcs_trainer.files import read_header

    assert read_header(path) == {"what": "naïve"}
    with pytest.raises(ValueError, match="cannot hold"):
        write_safetensors(tmp_path / "y.safetensors", {"x": torch.zeros(2, dtype=torch.complex64)}, {})
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.slow
def test_a_float32_twin_that_does_not_fit_is_a_warning_and_leaves_the_float16_network(monkeypatch):
    """The GPU is full in the middle of it: what was replaced is put back, and the training goes on unchecked."""
    model, done = load_model("tiny", dtype=torch.float16), []
    before = {name: p.clone() for name, p in model.unet.named_parameters()}
    put = float16.replace_data

    def full(parameter, value):
        if value.dtype == torch.float32:
            done.append(parameter)
            if len(done) > 5:
                raise torch.cuda.OutOfMemoryError
        put(parameter, value)

    monkeypatch.setattr(float16, "replace_data", full)
    one, told = trainer(model, steps=1, check_backend=True, probe_every=0), []
    one._check_gradients(one.objective(), lambda kind, text="", **data: told.append((kind, text)))
    one.learner.restore()
    assert told == [("warning", "gradients were not compared with the reference: out of memory")] and len(done) > 5
    after = dict(model.unet.named_parameters())
    assert all(after[name].dtype == torch.float16 and torch.equal(after[name], p) for name, p in before.items())
