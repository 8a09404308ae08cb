"""Names of the samplers, readable without torch; samplers.py has the function of each."""

from __future__ import annotations

NAMES = ("ddim", "dpmpp_2m", "euler", "euler_ancestral")
