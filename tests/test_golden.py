"""Files that version 0.1.0 wrote: its concepts, checkpoints, run.toml and exports still mean what they meant.

tests/golden was written by that version on the embedded model: two pictures, batch 1, three steps (`after-5`: five).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pcs_trainer import Trainer, import_concept, load_concept
from pcs_trainer.cli.commands import command
from pcs_trainer.cli.config import effective
from pcs_trainer.cli.options import parse
from pcs_trainer.concept.attach import predict
from pcs_trainer.errors import PcsError, UsageError
from pcs_trainer.methods import TITLES, method_named, settings_for
from pcs_trainer.settings import with_none_for_unset
from pcs_trainer.training.checkpoint import check_same_run, unset_then
from safetensors.torch import load_file
from trainer_cases import SMALL, cache, pictures, small_for

__all__ = ["cache"]

GOLDEN = Path(__file__).parent / "golden"
# folder -> (method, what its run was asked for)
RUNS = {
    "residuals": ("personalized_residuals", dict(rank=1, train_token=True)),
    "textboost_v1": ("textboost", dict(variant="v1", rank=1, augment=True, augment_probability=0.8)),
    "textboost_causal": ("textboost", dict(variant="causal++", rank=1)),
    "textual_inversion": ("textual_inversion", dict()),
}
STATES = {name: method for name, (method, _) in RUNS.items()} | {
    name: name for name in ("dreambooth", "dreambooth_lora", "custom_diffusion")
}


@pytest.mark.parametrize("name", [*RUNS, "dreambooth_lora", "cup"])
def test_an_old_concept_loads_and_acts(model, name):
    """load_concept refuses one that does nothing on the model, or whose tensors have no place."""
    concept = load_concept(GOLDEN / name / "concept.safetensors", model)
    raw = load_file(GOLDEN / name / "concept.safetensors")
    words = {f"word.{e}.{w}": r for w, rows in concept.words.items() for e, r in enumerate(rows)}
    held = concept.tensors | words
    assert held.keys() == raw.keys() and all(torch.equal(held[n], raw[n]) for n in raw)
    assert concept.class_word == "mug" and concept.meta["steps"] == "3"


@pytest.mark.parametrize("name", RUNS)
def test_an_old_checkpoint_goes_on_as_it_would_have_then(model, tmp_path, name):
    """On one machine bit for bit; another kind of processor rounds otherwise, and Adam's first steps are its signs."""
    method, settings = RUNS[name]
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    chosen = SMALL | small_for(method, bank=6) | dict(probe_every=0, steps=5) | settings
    trainer = Trainer(model, method, pictures(), class_word="mug", token="<cup>", out=tmp_path, **chosen)
    resumed = trainer.train(resume=True)
    then, before = (load_concept(GOLDEN / name / f"{file}.safetensors") for file in ("after-5", "concept"))
    assert resumed.tensors.keys() == then.tensors.keys() and resumed.words.keys() == then.words.keys()
    now, expected, start = (_all(concept) for concept in (resumed, then, before))
    assert float((expected - start).norm()) > 0
    assert float((now - expected).norm()) < 0.05 * float((expected - start).norm())


def _all(concept):
    rows = [r for word in sorted(concept.words) for r in concept.words[word]]
    return torch.cat([t.flatten().float() for t in [*(concept.tensors[n] for n in sorted(concept.tensors)), *rows]])


@pytest.mark.parametrize("name", STATES)
def test_the_settings_of_an_old_checkpoint_are_understood(name):
    """They hold every method's settings, and say "unset" by "" and 0; the same run is the same, another is refused."""
    folder, method = GOLDEN / name, STATES[name]
    file = next(p for p in (folder / "state.json", folder / "checkpoint-3" / "state.json") if p.is_file())
    was = json.loads(file.read_text())
    kind = method_named(method).settings
    known = settings_for(None, method).asdict()
    assert set(was["settings"]) - set(known) - {"subjects", "processes"}
    own = with_none_for_unset(kind, {n: v for n, v in was["settings"].items() if n in known and n != "method"})
    assert {"seed", "batch", "template", "timesteps", "prior_weight"} <= own.keys()  # a later setting is as its default
    own = {n: v for n, v in unset_then(kind, was["settings"]).items() if n not in was["settings"]} | own
    again = settings_for(None, method, **own | {"preview_prompts": tuple(own["preview_prompts"])})
    now = was | {"settings": json.loads(json.dumps(again.asdict()))}
    check_same_run(file, was, now, kind)
    with pytest.raises(ValueError, match=r"learning_rate was .* and is 0\.5"):
        check_same_run(file, was, now | {"settings": now["settings"] | {"learning_rate": 0.5}}, kind)


def test_an_old_run_toml_is_read():
    train = command("train")
    options = effective(train, parse(train, ["--config", str(GOLDEN / "cup" / "run.toml")]))
    assert (options.photos, options.method, options.token) == (["photos"], "personalized_residuals", "<cup>")
    assert (options.steps, options.batch, options.rank, options.plan, options.resolution) == (3, 1, 1, "B", 64)
    from pcs_trainer.cli.commands.train import overrides

    chosen = overrides(options)
    assert chosen["check_backend"] is False and chosen["lr_schedule"] == "cosine" and chosen["warmup"] == 1
    assert chosen["preview_prompts"] == ("a {subject} on the beach",)
    settings_for(None, options.method, **chosen)


@pytest.mark.parametrize("file", ["kohya/cup.safetensors", "diffusers/pytorch_lora_weights.safetensors"])
def test_an_old_export_is_read_back(model, file):
    """The LoRA's residuals are the concept's own, to the last bit of float32's product."""
    concept = load_concept(GOLDEN / "cup" / "concept.safetensors", model)
    imported = import_concept(GOLDEN / "cup" / file, model)
    prompt = "a photo of a mug"
    ours, theirs = (predict(model, [c], prompt) for c in (concept, imported))
    base = predict(model, [], prompt)
    assert float((ours - theirs).norm()) < 1e-4 * float((ours - base).norm()) + 1e-6 * float(base.norm())


def test_a_setting_of_another_method_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"personalized_residuals has no setting 'preservation_weight' \(textboost has"
    ):
        settings_for(None, "personalized_residuals", preservation_weight=0.5)
    with pytest.raises(ValueError, match=r"has no setting 'rank' \(personalized_residuals, .* have it\)"):
        settings_for(None, "dreambooth", rank=4)
    assert len(TITLES) >= 6 and issubclass(PcsError, Exception)


def test_a_flag_of_an_old_run_toml_that_the_method_does_not_use_is_left_out_and_told(tmp_path, capsys):
    """Version 0.1.0 took --rank with DreamBooth, which has none; on the command line it is refused."""
    from pcs_trainer.cli.commands.train import overrides

    file = tmp_path / "run.toml"
    file.write_text('[train]\nphotos = ["photos"]\nclass = "cup"\nmethod = "dreambooth"\nrank = 4\nsteps = 3\n')
    train = command("train")
    assert overrides(effective(train, parse(train, ["--config", str(file)]))) == {"class_word": "cup", "steps": 3}
    assert f"{file} sets rank, which dreambooth does not use" in capsys.readouterr().err
    with pytest.raises(UsageError, match="dreambooth has no setting 'rank'"):
        overrides(effective(train, parse(train, ["--config", str(file), "--rank", "4"])))
