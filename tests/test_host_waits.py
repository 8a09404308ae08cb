"""Inside a step the host never waits for the device, and sends it nothing but the step's inputs: every method."""

import pytest
import torch
from pcs_trainer.training.device_step import DeviceStep
from second_device import NAME, copies, folder, model, one_thread, waits
from test_second_device import INSIDE, METHODS, trainer
from trainer_cases import cache, small_for

__all__ = ["cache", "folder", "model", "one_thread"]

WARM = 2  # what is made once, such as optimizer states, may be looked at
CASES = [
    *(pytest.param(method, {}, id=method) for method in METHODS if method not in ("dreambooth", "lora_fa")),
    *(
        pytest.param(method, small_for(method, **INSIDE), id=f"{method} in the backward")
        for method in ("dreambooth", "custom_diffusion", "textboost")
    ),
    pytest.param("textboost", {"variant": "v1", "preservation_weight": 0.1}, id="preservation"),
    pytest.param("dreambooth", {"clip": "previous", "accumulate": 2, "step_in_backward": True}, id="previous"),
    pytest.param("custom_diffusion", {"optimizer": "adamw", "clip_norm": 0.1}, id="adamw"),
    pytest.param("dreambooth_lora", {"prior": "own", "prior_weight": 1.0, "snr_gamma": 5.0}, id="own prior"),
]


@pytest.fixture
def watched(monkeypatch):
    """What each step after the first two waited for, and what its work on the device took from the host."""
    found = []
    whole, work = DeviceStep.__call__, DeviceStep.on_device

    def step(self, number):
        waits.clear()
        made = whole(self, number)
        if number >= WARM:
            found.append((list(waits), self.taken))
        return made

    def on_device(self, inputs):
        copies.clear()
        result = work(self, inputs)
        self.taken = list(copies)
        return result

    monkeypatch.setattr(DeviceStep, "__call__", step)
    monkeypatch.setattr(DeviceStep, "on_device", on_device)
    return found


def test_a_wait_is_seen():
    x = torch.ones(3).to(NAME)
    for read in (lambda: bool(x.sum() > 2), lambda: float(x[0]), lambda: x.cpu(), lambda: x.tolist(), x.nonzero):
        waits.clear()
        read()
        assert waits
    for send in (lambda: x[torch.tensor([0])], lambda: torch.tensor(1.0, device=NAME), lambda: x.copy_(torch.ones(3))):
        copies.clear()
        send()
        assert copies


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), CASES)
def test_no_step_waits_for_the_device(model, watched, method, settings):
    trainer(model, method, **{"steps": 4, **settings}).train()
    assert watched == [([], [])] * 2
