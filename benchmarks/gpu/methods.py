"""Every method's step on SD 1.5: speed, the peak beside the planner's count, and the step within a hard cap.

The planner counts what the whole trainer holds; `beside_step` is its share that a rehearsed step does not make. A cap
is the project's goal for a step of one picture without the driver's share, and torch's allocator gets no byte more; the
layers follow the plan that the planner gives for it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.gpu.rehearsed import MODELS, eager_step, graphed_step, measured, model_name, rehearsed
from benchmarks.gpu.row import Absent, Machine, Row, peak_bytes
from pcs_trainer.memory.planner import CUDA_CONTEXT, Plan, plan
from pcs_trainer.memory.rehearsal import FROZEN_COPY
from pcs_trainer.methods import TITLES
from pcs_trainer.training.proof import PROOF_SIDE, compare_gradients

METHODS = tuple(TITLES)
NOT_MEASURED: dict[str, str] = {}
# SD 1.5 at 512 and one picture: bytes of the step, as in benchmarks/memory.py
CAPS = {"dreambooth": 4.1e9, "custom_diffusion": 2.5e9, "personalized_residuals": 1.9e9, "textboost": 2.2e9}
SMOKE = ("personalized_residuals",)  # the planner takes seconds for each
NOT_IN_A_STEP = ("copy of the last good state", FROZEN_COPY)  # of the planner's components


def planned(machine: Machine, method: str, batch: int, budget: float | None = None) -> Plan:
    """The planner's figures for what is then measured."""
    model = model_name(machine)
    dtype = torch.float32 if machine.smoke else torch.bfloat16
    return plan(MODELS[model][0], method, MODELS[model][1], batch, budget, dtype, machine.device, accumulate=1)


def figures(found: Plan) -> dict[str, Any]:
    beside = sum(found.components.get(name, 0) for name in NOT_IN_A_STEP)
    return {
        "planned_bytes": found.peak,
        "beside_step_bytes": beside,
        "plans": found.plans,
        "pictures": f"{found.batch}+{found.prior}" if found.prior else str(found.batch),
    }


def off(peak: int | None, said: dict[str, Any]) -> str:
    """How far the measured peak is from the planned one."""
    expected = said["planned_bytes"] - said["beside_step_bytes"]
    return "" if peak is None else f", planned {expected / 1e9:.3f} ({peak / expected - 1:+.1%})"


def eager(method: str, batch: int, machine: Machine) -> dict[str, Any]:
    """The method's own step, its fastest plans."""
    expected = planned(machine, method, batch)
    real = rehearsed(machine, model_name(machine), method, expected.batch + expected.prior, expected.assignment)
    found = {**figures(expected), **measured(machine, eager_step(real), real.images)}
    return {**found, "said": found["said"] + off(found["peak_bytes"], found)}


def graph(method: str, machine: Machine) -> dict[str, Any]:
    """The forward and the backward as one graph: of DreamBooth, whose step lies in the backward, another method."""
    if machine.smoke:
        raise Absent("a CUDA graph needs CUDA")
    real = rehearsed(machine, model_name(machine), method, pictures(method), in_backward=False)
    return measured(machine, graphed_step(real), real.images)


def pictures(method: str) -> int:
    """Of one step with one picture of the subject, the class's beside it."""
    from pcs_trainer.methods import settings_for

    return 2 if settings_for(None, method).prior_weight else 1


def capped(method: str, machine: Machine) -> dict[str, Any]:
    """One picture within the cap: the allocator refuses what is above it."""
    cap = CAPS[method]
    goal = None if machine.smoke else cap + CUDA_CONTEXT
    expected = planned(machine, method, 1, goal)
    if expected.missing:
        raise RuntimeError(f"the planner finds no step within {cap / 1e9:.1f} GB: {expected.missing}")
    if not machine.smoke:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    real = rehearsed(machine, model_name(machine), method, expected.batch + expected.prior, expected.assignment)
    found = {**figures(expected), "cap_bytes": cap, **measured(machine, eager_step(real), real.images)}
    return {**found, "said": f"{found['said']} within {cap / 1e9:.1f} GB{off(found['peak_bytes'], found)}"}


def proof(method: str, machine: Machine) -> dict[str, Any]:
    """The comparison with the reference before step 1, at the size that the trainer takes for it."""
    real = rehearsed(machine, model_name(machine), method, 1, in_backward=False)
    real.latent = min(real.latent, PROOF_SIDE)

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return real.loss()

    agreed = compare_gradients(real.learner.parameters, loss, exact=machine.smoke)
    peak = peak_bytes()
    return {"peak_bytes": peak, "said": agreed if peak is None else f"peak {peak / 1e9:.3f} GB; {agreed}"}


def rows(smoke: bool) -> list[Row]:
    """What decides a claim comes first: peaks at batch 1, then the caps. On the CPU one method."""
    methods, caps = (SMOKE, SMOKE) if smoke else (METHODS, tuple(CAPS))
    found = [Row(f"{method}, batch 1, eager", functools.partial(eager, method, 1)) for method in methods]
    found += [Row(f"{method}, batch 1, within its cap", functools.partial(capped, method)) for method in caps]
    found += [Row(f"{method}, proof", functools.partial(proof, method)) for method in caps]
    if smoke:
        return found
    found += [Row(f"{method}, batch 4, eager", functools.partial(eager, method, 4)) for method in methods]
    for method in methods:
        way = ", optimizer after the backward" if method == "dreambooth" else ""
        found.append(Row(f"{method}, batch 1, graph{way}", functools.partial(graph, method)))
    return found
