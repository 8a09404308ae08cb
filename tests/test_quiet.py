"""Loading a model prints nothing: no notes of other libraries, no bars; their errors still show."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from every_case import cases
from pcs_trainer.model.quiet import quiet
from test_model_loading import write_model

LOADS = """
import sys
sys.path[:0] = {path!r}
import torch
from pcs_trainer import load_model
from pcs_trainer.model.autoencoder import encode_images
model = load_model(sys.argv[1], torch.bfloat16)
model.unet, model.text_encoders, model.tokenizers, model.vae, model.schedule
import numpy as np
encode_images(model, [np.zeros((16, 16, 3), np.uint8)])
assert not {bitsandbytes} or "bitsandbytes" in sys.modules  # transformers imports it: what it says was not shown
from transformers.utils import logging
from huggingface_hub.utils import are_progress_bars_disabled
assert logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", cases(["sdxl"], ["sd1"]))  # SDXL loads all that SD1.x does
def test_nothing_is_printed_while_a_model_loads(tmp_path, family):
    """In a fresh process, as a library says most when it is imported."""
    code = LOADS.format(path=[p for p in sys.path if p], bitsandbytes=find_spec("bitsandbytes") is not None)
    folder = write_model(tmp_path / "model", family)
    plain = {n: v for n, v in os.environ.items() if not n.endswith("_VERBOSITY")}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, env=plain)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@quiet("diffusers", "transformers")
def speak() -> None:
    for name in ("diffusers", "transformers", "bitsandbytes", "mine"):
        logging.getLogger(f"{name}.somewhere").warning("a note")
        logging.getLogger(f"{name}.somewhere").error("an error")


def test_errors_show_and_other_loggers_are_left_alone(caplog):
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    before = [logging.getLogger(n).level for n in ("diffusers", "transformers", "bitsandbytes")]
    for library in (diffusers, transformers):
        library.enable_propagation()
    speak()
    for library in (diffusers, transformers):
        library.disable_propagation()
    told = [(r.name.split(".")[0], r.getMessage()) for r in caplog.records]
    assert told.count(("mine", "a note")) == 1
    assert {n for n, text in told if text == "an error"} == {"diffusers", "transformers", "bitsandbytes", "mine"}
    assert [n for n, text in told if text == "a note"] == ["mine"]
    assert [logging.getLogger(n).level for n in ("diffusers", "transformers", "bitsandbytes")] == before
