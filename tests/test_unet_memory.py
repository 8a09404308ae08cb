"""What a training step keeps, byte by byte, at the real sizes; and what each plan computes once more."""

from __future__ import annotations

import pytest
from kept_bytes import ours_keeps, peer_keeps, step_flops
from unet_families import SD15_REAL, SD21_REAL, SDXL_REAL

# (configuration, latent size, MB allowed for plans A, B, C at batch 1 in bf16 with a frozen UNet)
REAL = {
    "SD1.5 512": (SD15_REAL, 64, {"A": 503, "B": 300, "C": 148}),
    "SD2.1 768": (SD21_REAL, 96, {"A": 1132, "B": 675, "C": 332}),
    "SDXL 1024": (SDXL_REAL, 128, {"A": 4020, "B": 2175, "C": 790}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(REAL))
def test_kept_bytes_of_a_frozen_unet(name, record_property):
    config, size, allowed = REAL[name]
    theirs = peer_keeps(config, size)
    record_property("diffusers", theirs)
    for plan, limit in allowed.items():
        hooked, alive = ours_keeps(config, size, plan)
        record_property(plan, hooked)
        print(f"{name} plan {plan}: {hooked:.0f} MB by hooks, {alive:.0f} MB alive; diffusers {theirs:.0f} MB")
        assert max(hooked, alive) <= limit
        assert hooked < theirs
    checkpoint = max(ours_keeps(config, size, "checkpoint"))
    assert checkpoint < hooked


@pytest.mark.slow
def test_kept_bytes_of_a_full_fine_tune():
    theirs = peer_keeps(SD15_REAL, 64, full=True)
    hooked, alive = ours_keeps(SD15_REAL, 64, "A", full=True)
    print(f"full fine-tune plan A: {hooked:.0f} MB by hooks, {alive:.0f} MB alive; diffusers {theirs:.0f} MB")
    assert max(hooked, alive) <= 546 < theirs
    assert max(ours_keeps(SD15_REAL, 64, "C", full=True)) < hooked


@pytest.mark.slow
def test_a_plan_per_layer_keeps_what_lies_between():
    mixed = {"": "C", "up_blocks.3": "A"}
    low, middle, high = (ours_keeps(SD15_REAL, 64, plan)[0] for plan in ("C", mixed, "A"))
    assert low < middle < high


@pytest.mark.slow
def test_flops_of_the_step_and_of_each_plan():
    forward, eager = step_flops(SD15_REAL, 64, "eager")
    enlarged = 18 * (1280**2 * (16**2 + 32**2) + 640**2 * 64**2)  # the convolutions after an enlargement
    assert forward == pytest.approx(0.803e12 - enlarged * (1 - 16 / 36), rel=0.01)
    more = {plan: (step_flops(SD15_REAL, 64, plan)[1] - eager) / forward for plan in ("A", "B", "C", "checkpoint")}
    print(f"forward {forward / 1e12:.3f} TFLOP, frozen step {eager / 1e12:.3f}; computed again: {more}")
    assert more["A"] == 0
    assert 0 < more["B"] <= 0.14
    assert more["B"] < more["C"] <= 0.25
    assert more["C"] < more["checkpoint"] <= 1
