"""Memory and processor time of loading a UNet of the real size."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from unet_families import SD15_REAL

WEIGHTS = "diffusion_pytorch_model.safetensors"

MEASURE = """
import resource, sys, threading, time, torch
from pcs_trainer import load_model
import pcs_trainer.model.model, safetensors.torch
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def load():
    model = load_model(sys.argv[1], dtype=torch.bfloat16)
    return model.unet
before, start = peak(), time.process_time()
unet = load()
seconds, loaded = time.process_time() - start, peak() - before
total = sum(float(p.flatten().view(torch.int16)[::512].sum()) for p in unet.parameters())
touched, start = peak() - before, time.process_time()
torch.empty(2**24).normal_()
drawn = (time.process_time() - start) * sum(p.numel() for p in unet.parameters()) / 2**24
print(seconds, loaded, touched, drawn)
"""


@pytest.fixture(scope="module")
def real_size(tmp_path_factory):
    """SD1.5's UNet with zero weights in bf16 (1.7 GB, a sparse file): its folder and the file's size."""
    from pcs_trainer.unet.unet import UNet

    root = tmp_path_factory.mktemp("real")
    (root / "unet").mkdir()
    (root / "unet" / "config.json").write_text(json.dumps(SD15_REAL))
    header, at = {}, 0
    for name, p in UNet.from_config(SD15_REAL, device="meta").state_dict().items():
        end = at + 2 * p.numel()
        header[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(root / "unet" / WEIGHTS, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return root, at


@pytest.mark.slow
def test_memory_and_time_of_loading_sd15(real_size):
    root, size = real_size
    run = subprocess.run([sys.executable, "-c", MEASURE, str(root)], capture_output=True, text=True, check=True)
    seconds, loaded, touched, drawn = map(float, run.stdout.split())
    print(f"loaded in {seconds:.2f} s, {loaded / size:.2f} x the file; every page read: {touched / size:.2f} x")
    assert touched <= 1.1 * size  # the mapped file once; a second copy of the weights would make it 2
    print(f"{drawn:.2f} s to draw as many random weights")
    assert seconds < drawn  # a network that is built, and then filled, takes longer; on a busy machine both do
