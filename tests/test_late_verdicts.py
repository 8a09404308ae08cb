"""A GPU's host hears of a step one step late: what it does by then must not rest on the step before."""

import types

import torch
from pcs_trainer.training import run
from pcs_trainer.training.optimizer import Stepper
from trainer_cases import cache, trainer

__all__ = ["cache"]


def test_no_norm_of_a_step_that_may_have_been_bad_clips_the_next_one(model):
    """Before the first good step is known; after it the norm of the step before is the one that clips."""
    t = trainer(model, "dreambooth", step_in_backward=True, clip="previous")
    stepper = Stepper(t.learner, t.settings)
    try:
        stepper.handle.norm = torch.tensor(float("nan"))
        stepper.prepare(1)
        assert stepper.handle.norm is None
        stepper.is_settled, stepper.handle.norm = True, torch.tensor(2.0)
        stepper.prepare(2)
        assert float(stepper.handle.norm) == 2.0
    finally:
        stepper.close()
        t.learner.restore()


def test_the_proof_is_not_missed_where_several_verdicts_are_read_at_once():
    """A checkpoint reads all that wait: the count of steps goes from one below the proof's to one above it."""
    said = []
    one = types.SimpleNamespace(
        taken=run.PROOF_STEP - 1,
        step=run.PROOF_STEP,
        s=types.SimpleNamespace(steps=2 * run.PROOF_STEP),
        movement=types.SimpleNamespace(check=lambda seen, unasked: "all of it trains"),
        shown_to_train=False,
        learner=types.SimpleNamespace(unreached=lambda prompts: [], indifferent=()),
        prompts=set(),
        stepper=types.SimpleNamespace(has_seen=None),
        say=lambda kind, text: said.append((kind, text)),
    )
    run.Run.prove(one)
    assert not said
    for one.taken in (run.PROOF_STEP + 1, run.PROOF_STEP + 2):
        run.Run.prove(one)
    assert said == [("proof", "all of it trains")]
