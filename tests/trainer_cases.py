"""Small runs of the trainer on the embedded model."""

import os
from dataclasses import fields

import pytest
from pcs_trainer.methods import TITLES, method_named
from pcs_trainer.tiny.subjects import photos
from pcs_trainer.training.trainer import Trainer

METHODS = tuple(TITLES)
SMALL = dict(batch=1, prior_images=2, prior_steps=2, check_backend=False)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Nothing of a test is kept in the user's cache folder."""
    before = os.environ.get("PCS_CACHE")
    os.environ["PCS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("PCS_CACHE")
    if before is not None:
        os.environ["PCS_CACHE"] = before


def small_for(method, **settings):
    """Those of the settings that the method has."""
    known = {field.name for field in fields(method_named(method).settings)}
    return {name: value for name, value in settings.items() if name in known}


def pictures(n=2, seed=51):
    return [p.picture for p in photos(seed, n)]


def trainer(model, method="personalized_residuals", out=None, **settings):
    return Trainer(model, method, pictures(), class_word="mug", out=out, **SMALL | small_for(method, bank=6) | settings)
