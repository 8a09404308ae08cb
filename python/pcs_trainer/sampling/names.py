"""Names of the samplers, presets and masks, readable without torch; samplers.py has the function of each sampler."""

from __future__ import annotations

NAMES = ("ddim", "dpmpp_2m", "euler", "euler_ancestral")
LAG_UNCOND = ("reuse", "zero", "one")  # LAG's mask of the half without prompt
# How the methods' authors sample, where they say it: name -> steps, guidance, sampler, eta.
PRESETS = {
    "custom_diffusion": {"steps": 100, "guidance": 6.0, "sampler": "ddim", "eta": 1.0},
    "textboost": {"steps": 25, "guidance": 7.5, "sampler": "dpmpp_2m", "eta": 0.0},
}
