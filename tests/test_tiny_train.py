"""The script that makes the tiny model, on sizes that take seconds."""

import json
import shutil

import numpy as np
import pytest
import torch
from pcs_trainer.tiny import common
from pcs_trainer.tiny.make import budget, card, networks, train, train_unet, train_vae
from pcs_trainer.tiny.tokenizer import learn_merges, write_tokenizer


def test_help_and_unknown_stages(capsys):
    with pytest.raises(SystemExit):
        train.arguments(["--cache", "x", "paint"])
    assert "unknown stage 'paint'; choose from pictures, vae, judge, unet, folder, continue" in capsys.readouterr().err
    assert train.arguments(["--cache", "x"]).stages == list(train.STAGES)


def test_the_learning_rate_warms_up_stays_flat_and_ends_low():
    minute = budget.Budget(1.0, warmup_steps=10, flat_until=0.5)
    assert minute.factor(0) == pytest.approx(0.1) and minute.factor(100) == 1.0
    minute.spent = 60.0
    assert minute.over and minute.factor(100) == pytest.approx(0.01)


def test_merges_make_each_word_one_token_most_frequent_first():
    merges = learn_merges({"ab": 5, "abc": 1, "cab": 1})
    assert merges[0] == ("a", "b</w>") and ("a", "b") in merges and len(merges) == 4


@pytest.mark.slow
def test_whitening_keeps_the_pictures_and_makes_latents_white():
    torch.manual_seed(0)
    vae = train_vae.build_vae().eval()
    pictures = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    x = common.to_tensor(pictures)
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mean).sample
        train_vae.whiten(vae, pictures)
        z = vae.encode(x).latent_dist.mean
        after = vae.decode(z).sample
    assert torch.allclose(before, after, atol=1e-3)
    covariance = torch.cov(z.permute(1, 0, 2, 3).flatten(1))
    assert torch.allclose(covariance, torch.diag(covariance.diagonal()), atol=0.02)
    assert covariance.diagonal().sqrt().min() > train_vae.FLOOR - 0.02 and covariance.diagonal().sqrt().max() < 1.02


def test_the_schedule_ends_in_noise_and_is_diffusers_own():
    from diffusers import DDIMScheduler

    abar = networks.alphas()
    assert torch.allclose(abar, DDIMScheduler(**networks.SCHEDULE).alphas_cumprod, rtol=1e-4)
    assert abar[0] > 0.999 and abar[-1] < 3e-4


def test_the_average_follows_and_swaps():
    weight = torch.nn.Parameter(torch.zeros(3))
    average = train_unet.Average([weight], decay=0.5)
    with torch.no_grad():
        weight += 1
    average.update(1000)
    average.swap()
    assert torch.equal(weight, torch.full((3,), 1 - 0.5**4)) and torch.equal(average.values[0], torch.ones(3))


def test_the_model_card_is_what_its_script_writes(tmp_path):
    for file in (common.WEIGHTS.parent / "results.json", common.WEIGHTS.parent / "training.json"):
        shutil.copy(file, tmp_path / file.name)
    shutil.copytree(common.WEIGHTS, tmp_path / "weights")
    (tmp_path / "weights" / "README.md").unlink()
    card.write_card(tmp_path / "weights")
    assert (tmp_path / "weights" / "README.md").read_text() == (common.WEIGHTS / "README.md").read_text()


@pytest.fixture
def small_set(tmp_path):
    said = [["a red mug on the beach", "a patterned cup"], ["a blue cat in the snow", "a cat"]] * 16
    write_tokenizer([t for s in said for t in s] + list(train_unet.DECORATED), tmp_path / "tokenizer")
    (tmp_path / "captions.json").write_text(json.dumps(said))
    np.save(tmp_path / "latents.npy", np.random.default_rng(0).standard_normal((32, 8, 16, 16)).astype(np.float16))
    return tmp_path


@pytest.mark.slow
def test_a_second_run_resumes_where_the_first_stopped(small_set):
    def run(minutes):
        files = (small_set / name for name in ("tokenizer", "captions.json", "latents.npy"))
        train_unet.train_unet(small_set, *files, minutes, batch=4, workers=1)
        return budget.load_checkpoint(small_set / "unet.ckpt")

    first = run(0.005)
    second = run(0.01)
    assert 0 < first["step"] < second["step"] and second["seen"] == 4 * second["step"]
    assert any(not torch.equal(first["unet"][k], second["unet"][k]) for k in first["unet"])


def _average_gradients(rank, port, folder):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    weights = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    for w in weights:
        w.grad = torch.full_like(w, float(rank + 1))
    mean = train_unet.share_gradients(weights, torch.tensor([10.0 * rank, 1.0]))
    torch.save([mean, *(w.grad for w in weights)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_their_gradients(tmp_path):
    torch.multiprocessing.spawn(_average_gradients, (train_unet.free_port(), str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        mean, first, second = torch.load(tmp_path / f"{rank}.pt")
        assert mean.tolist() == [5.0, 1.0]
        assert torch.equal(first, torch.full((2, 3), 1.5)) and torch.equal(second, torch.full((4,), 1.5))


def test_batches_hide_some_captions_and_rename_some_decorations(small_set):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(small_set / "tokenizer")
    tokens, empty = train_unet.tokenise(tokenizer, json.loads((small_set / "captions.json").read_text()), small_set)
    batches = train_unet.Batches(np.load(small_set / "latents.npy"), tokens, empty, tokenizer, 0)
    ids = torch.cat([batches.draw(200)[1] for _ in range(10)]).numpy()
    assert 0.07 < (ids == empty).all(1).mean() < 0.13
    patterned, rare = np.isin(ids, batches.decorated).any(1).sum(), np.isin(ids, batches.rare).any(1).sum()
    assert 0.2 < rare / (rare + patterned) < 0.4
