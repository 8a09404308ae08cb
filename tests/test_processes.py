"""Several processes: where the first one fails, the others end too, with a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pcs_trainer import distributed
from pcs_trainer.errors import TrainingStopped

FIRST_FAILS = """
import os, sys
sys.path[:0] = {path!r}
from datetime import timedelta
import torch.distributed as dist
from pcs_trainer import distributed
distributed.WAIT = timedelta(seconds=30)
rank = 0 if os.fork() else 1
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # a line at once: both processes write to one pipe

try:
    with distributed.first_alone("drawing a mug"):
        if rank == 0:
            {fails}
except Exception as error:
    say(rank, type(error).__name__, error)
else:
    say(rank, "went on")
if rank == 0:
    os.wait()
os._exit(0)
"""


def said(folder: Path, fails: str, code_of_the_first: int = 0) -> list[str]:
    """What two processes print of a part that the first one does before the other."""
    code = FIRST_FAILS.format(path=[p for p in sys.path if p], fails=fails)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "meeting")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code_of_the_first, done.stderr[-3000:]
    return sorted(done.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_others_end_where_the_first_process_fails(tmp_path):
    first, other = said(tmp_path, "raise ValueError('no picture')")
    assert first == "0 ValueError no picture"
    assert other.startswith("1 TrainingStopped the first process failed while drawing a mug and says why")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_others_end_where_the_first_process_is_gone(tmp_path):
    (other,) = said(tmp_path, "os._exit(9)", 9)
    assert other.startswith("1 TrainingStopped the first process ended while drawing a mug")


@pytest.mark.parametrize("rank, sentence", [(0, "another process ended before"), (1, "the first process ended while")])
def test_a_process_that_ends_while_they_connect(monkeypatch, rank, sentence):
    def connect(**how):
        raise RuntimeError("Gloo connectFullMesh failed with remote worker crashing")

    monkeypatch.setattr(distributed, "rank_and_world", lambda: (rank, 2))
    monkeypatch.setattr(distributed.dist, "new_group", connect)
    with pytest.raises(TrainingStopped, match=f"{sentence} drawing a mug"), distributed.first_alone("drawing a mug"):
        raise AssertionError("nothing is done alone")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_all_go_on_where_it_does_not_fail(tmp_path):
    assert said(tmp_path, "pass") == ["0 went on", "1 went on"]
