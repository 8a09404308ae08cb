"""The public face of pcs_trainer: every name is what it says, whatever was imported or used before."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import face
import pcs_trainer
import pytest

# What README and docs promise; a name leaves this list only with a line in CHANGELOG.md.
PROMISED = {
    "load_model", "Trainer", "sample", "Concept", "merge", "plan", "evaluate", "load_concept", "blend", "compress",
    "export", "import_concept", "Settings", "Model", "UNet", "Lag", "Maps", "Plan", "Event", "TrainingStopped",
    "LowRank", "Schedule", "decode", "trainable",
}  # fmt: skip


@pytest.mark.parametrize("name", pcs_trainer.__all__)
def test_every_public_name_is_a_class_or_a_function_and_not_a_module(name):
    found = getattr(pcs_trainer, name)
    assert callable(found) and not isinstance(found, ModuleType)
    assert found.__name__ == name and found.__module__.startswith("pcs_trainer.")


def test_what_was_promised_is_there():
    assert set(pcs_trainer.__all__) >= PROMISED
    assert set(dir(pcs_trainer)) >= PROMISED
    with pytest.raises(AttributeError, match="has no attribute 'trainer'"):
        pcs_trainer.trainer  # noqa: B018


@pytest.mark.slow
def test_names_stay_functions_after_the_modules_behind_them_were_used(model, tmp_path):
    """merge, export and evaluate once turned into modules after Concept.compress or Concept.export had been called."""
    import concept_cases

    learned = concept_cases.residuals(model)
    learned.compress(0.9, model)
    learned.export(tmp_path, "kohya")
    for room in ("concept", "concept.formats", "evaluation", "memory", "sampling", "training"):
        __import__(f"pcs_trainer.{room}")
    from pcs_trainer import Concept, Trainer, evaluate, export, load_model, merge, plan, sample

    for name in (Concept, Trainer, evaluate, export, load_model, merge, plan, sample):
        assert callable(name) and not isinstance(name, ModuleType)


def test_the_names_for_editors_are_those_of_the_dict():
    assert face.STUB.read_text() == face.stub(), "make face writes python/pcs_trainer/__init__.pyi anew"


def test_importing_the_face_loads_no_torch():
    code = "import sys, pcs_trainer; pcs_trainer.__all__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
