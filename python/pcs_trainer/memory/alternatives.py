"""What a run would be like within other budgets: the same questions for a row of memory sizes, as one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..units import bytes_text
from .whole_run import RunPlan, plan_run

BUDGETS = ("4GB", "6GB", "8GB", "12GB", "16GB", "24GB")  # of the cards that people have


def alternatives(model: Any, method: str, budgets: Sequence[str] = BUDGETS, **asked: Any) -> list[tuple[str, RunPlan]]:
    """The plan of a run within each of these budgets, from the smallest on, up to one that changes nothing.

    Args:
        model: as `plan_run` takes it.
        method: its name.
        budgets: from the smallest on.
        asked: the other arguments of `plan_run`, but for the budget.
    """
    free = plan_run(model, method, budget=None, **asked | {"card": None})
    found: list[tuple[str, RunPlan]] = []
    for budget in budgets:
        found.append((budget, plan_run(model, method, budget=budget, **asked)))
        if found[-1][1].fits and found[-1][1].settings == free.settings:
            break
    return found


def table(found: Sequence[tuple[str, RunPlan]]) -> str:
    """A line for each budget: what is needed, what it costs beside the last that fits, how the networks are held."""
    fitting = [plan for _, plan in found if plan.fits]
    lines = ["within other budgets:"]
    for budget, plan in found:
        if not plan.fits:
            lines += [f"  {budget:<6}{plan.missing}"]
            continue
        step = plan.step
        held = [f"weights {plan.weights}"] * (plan.weights != "full")
        held += [f"{name} streamed" for name in ("resident", "states") if getattr(plan, name) == "streamed"]
        held += ["offload"] * (plan.offload and step.device != "cpu")
        held += [f"packed copies {plan.packing}"] * (step.device == "cpu" and plan.packing != "both")
        held += [f"batch {step.batch}" + f" x {step.accumulate}" * (step.accumulate > 1), f"recomputation {step.plans}"]
        cost = _cost(plan, fitting[-1])
        lines += [f"  {budget:<6}{bytes_text(plan.largest.bytes):>8} needed, {cost}: {', '.join(held)}"]
    return "\n".join(lines)


def _cost(plan: RunPlan, fastest: RunPlan) -> str:
    """A step's time where a card's is modelled, else its work beside the fastest plan's."""
    if not plan.seconds:
        return f"{plan.step.slowdown:+.0%} work"
    beside = plan.seconds / fastest.seconds - 1
    return f"{plan.seconds:.3g} s a step" + (f" ({beside:+.0%})" if plan is not fastest else "")
