"""The judge that ships: it reads real pictures, tells subjects apart, and its distances behave."""

import numpy as np
import pytest
import torch
from pcs_trainer.tiny import captions, judge, world
from pcs_trainer.tiny.make.evaluate import retrieval
from pcs_trainer.tiny.training_set import TEST_SEEDS


@pytest.fixture(scope="module")
def the_judge():
    return judge.load_judge()


@pytest.fixture(scope="module")
def scenes():
    return [world.scene(TEST_SEEDS + 70_000_000 + i) for i in range(150)]


@pytest.fixture(scope="module")
def pictures(scenes):
    return np.stack([world.render(s) for s in scenes])


def test_it_reads_real_pictures(the_judge, scenes, pictures):
    share = judge.agreement(the_judge.read(pictures), scenes)
    assert min(share[f] for f in ("kind", "colour", "background")) >= 0.95, share
    assert min(share[f] for f in ("pattern", "position")) >= 0.9, share


def test_it_does_not_read_noise_as_it_reads_pictures(the_judge, scenes):
    noise = np.random.default_rng(0).integers(0, 256, (150, 64, 64, 3), dtype=np.uint8)
    assert judge.agreement(the_judge.read(noise), scenes)["triple"] < 0.05


def test_it_tells_unseen_subjects_apart(the_judge):
    found = retrieval(the_judge, 60)
    assert found["rank_1"] >= 0.9
    assert found["cosine_same_subject"] > found["cosine_other_subject_of_the_class"] + 0.3


def test_captions_find_their_pictures(the_judge, scenes, pictures):
    texts = [captions.caption(s, np.random.default_rng(i), full=True).text for i, s in enumerate(scenes)]
    scores = the_judge.image_embedding(pictures) @ the_judge.text_embedding(texts).T
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    assert (rank < 5).float().mean() > 0.8
    assert torch.allclose(the_judge.text_embedding(texts).norm(dim=1), torch.ones(150))


def test_tensors_and_arrays_are_read_alike(the_judge, pictures):
    from pcs_trainer.tiny.common import to_tensor

    assert torch.equal(the_judge.features(pictures[:4]), the_judge.features(to_tensor(pictures[:4])))


def test_pictures_of_another_size_are_refused(the_judge):
    with pytest.raises(ValueError, match=r"uint8 pictures of shape \(N, 64, 64, 3\)"):
        the_judge.read(np.zeros((1, 32, 32, 3), np.uint8))


def test_the_frechet_distance_of_gaussians():
    """Against the closed form for diagonal covariances: |mu1 - mu2|^2 + sum (s1 - s2)^2."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(60_000, 3, generator=g, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor(
        [0.0, 1.0, 0.0]
    )
    b = torch.randn(60_000, 3, generator=g, dtype=torch.float64) * torch.tensor([2.0, 2.0, 1.0])
    assert judge.frechet(a, b) == pytest.approx(1 + 1 + 0.25, rel=0.03)
    assert judge.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_agreement_counts_only_what_was_named():
    scenes = [
        world.scene(1, kind="mug", colour="red", background="beach"),
        world.scene(2, kind="cat", colour="blue", background="snow"),
    ]
    found = {f: [getattr(s, f) for s in scenes] for f in judge.FIELDS}
    found["colour"][1] = "red"
    assert judge.agreement(found, scenes)["colour"] == 0.5
    assert judge.agreement(found, scenes, [{"colour"}, set()])["colour"] == 1.0
    assert judge.agreement(found, scenes)["triple"] == 0.5


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"judge's weights are missing .*pcs_trainer.tiny.make.train"):
        judge.load_judge(tmp_path)
