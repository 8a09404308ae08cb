"""Names of the memory plans, readable without torch: what a training step computes again, so as not to keep it."""

from __future__ import annotations

import difflib

# Short name, as checkpoints and configuration files hold it -> the name in help, tables and messages.
# Each plan computes again what the one before it does, and more; a resnet block follows B and C as it follows A.
PLAN_NAMES = {
    "eager": "keep_all",  # nothing
    "A": "rebuild_norms",  # normalized, gated and upsampled values, where a trained weight reads them
    "B": "rebuild_feedforward",  # and the feed-forward's first projection
    "C": "rebuild_around_attention",  # and all of a transformer block but its self-attention
    "checkpoint": "rebuild_all",  # everything in a resnet block or transformer, from its input
}
PLANS = tuple(PLAN_NAMES)


def short_plan(name: object) -> str:
    """The short name of a memory plan that was given by either name.

    Args:
        name: a key or a value of PLAN_NAMES.

    Raises:
        ValueError: one sentence with the nearest name, where there is one, and all names.
    """
    if isinstance(name, str):
        for short, long in PLAN_NAMES.items():
            if name in (short, long):
                return short
    known = ", ".join(f"{long} ({short})" for short, long in PLAN_NAMES.items())
    near = difflib.get_close_matches(str(name).replace("-", "_"), [*PLAN_NAMES.values(), *PLANS], 1)
    hint = f"did you mean {near[0]!r}? The plans are" if near else "choose one of"
    raise ValueError(f"the memory plan {name!r} is unknown; {hint} {known}")
