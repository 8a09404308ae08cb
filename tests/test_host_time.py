"""What benchmarks/host_time.py measures is the way a GPU's tensors take."""

import csv
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed here; there are no launches")
pytest.importorskip("diffusers", reason="diffusers is not installed here; the peer is its network")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import host_time

import pcs_kernels
from pcs_kernels import _launch

SMALL = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


@pytest.mark.slow
def test_a_step_takes_the_kernels_of_a_gpu(monkeypatch):
    if _launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1: interpreted kernels are not launched")
    torch.utils.deterministic.fill_uninitialized_memory = False
    launched: list[str] = []

    class Named(host_time.NoCard):
        def __init__(self):
            super().__init__()
            self.launcher_cls = lambda source, metadata: lambda *launch: launched.append(source.fn.__name__)

    monkeypatch.setattr(host_time, "NoCard", Named)
    with host_time.as_on_a_gpu():
        both = host_time.steps(host_time.SD15 | host_time.TINY | SMALL)
        counts = []
        for _ in range(5):
            launched.clear()
            forward, backward = host_time.seconds(both["ours"])
            assert forward > 0 and backward > 0
            counts.append(sorted(launched))
        launched.clear()
        host_time.seconds(both["diffusers"])
    assert not launched, "the peer is torch's alone"
    assert all(count == counts[0] for count in counts), "a step played again has other launches"
    families = {name.split("_")[0] for name in counts[0]}
    assert families >= {"gn", "geglu", "cross", "lowrank"} and "frozen" not in families and "self" not in families
    with pytest.raises(pcs_kernels.BackendUnavailable), pcs_kernels.backend("triton"):
        pcs_kernels.geglu(torch.randn(2, 8))  # nothing of it stays


def test_the_results_hold_both_models_and_every_op():
    with host_time.RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} >= {*host_time.MODELS, *host_time.single_ops()}
    assert all(float(row["sum_ms"]) > 0 for row in rows if row["case"] in host_time.MODELS)
