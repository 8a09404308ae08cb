"""plan(): what a training step needs in memory, part by part, and the fastest memory plans that fit a budget.

The step is rehearsed on tensors without contents and every storage it makes is counted, so the figures need no GPU and
no weights. On a GPU, measure=True runs the candidates for real under a hard cap.  GB is 10^9 bytes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..methods import settings_for
from ..model.model import Model, load_model
from ..settings import Settings
from ..unet.plans import PLAN_NAMES, PLANS
from ..units import parse_bytes
from .assign import fastest, fastest_within, smallest
from .counts import Counted, Request, counted_once
from .networks import Networks, networks_of
from .rehearsal import FROZEN_COPY, Rehearsal

CUDA_CONTEXT = 500_000_000  # allowed for what the driver takes before the first tensor; not measured here
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Plan:
    """A training step's memory and the memory plan of each layer; `str(plan)` is a table."""

    method: str
    resolution: int
    batch: int  # pictures of the subject in one forward
    prior: int  # prior or regularization pictures in the same forward
    accumulate: int  # forwards in one optimizer step
    device: str
    budget: int | None
    components: dict[str, int]  # bytes at the peak; their sum is `peak`
    context: int  # what the driver takes beside it
    kept: int  # bytes kept for the backward when it begins
    gradients: int  # the most bytes of gradients alive at once
    assignment: dict[str, str]  # for UNet.set_plan
    slowdown: float  # the step's work over that of the fastest plans, minus one
    prior_cost: str = ""  # what the prior loss costs beside the step, as one phrase
    missing: str = ""  # empty where the plan fits, else what is missing
    measured: dict[str, float] = field(default_factory=dict)  # on a GPU: seconds and bytes of one real step

    @property
    def peak(self) -> int:
        return sum(self.components.values())

    @property
    def total(self) -> int:
        """Bytes to be had: the peak and the driver's share."""
        return self.peak + self.context

    @property
    def fits(self) -> bool:
        return not self.missing

    @property
    def settings(self) -> dict[str, Any]:
        """The trainer's settings that this plan stands for."""
        return {"batch": self.batch, "accumulate": self.accumulate, "plan": self.assignment}

    @property
    def plans(self) -> str:
        """How many layers follow each memory plan, as one phrase."""
        counts = Counter(self.assignment.values())
        return ", ".join(f"{counts[p]} {p}" for p in PLANS if counts[p])

    def __str__(self) -> str:
        pictures = f"{self.batch} + {self.prior} prior" if self.prior else str(self.batch)
        per = f", {self.accumulate} forwards a step" if self.accumulate > 1 else ""
        lines = [f"{self.method} at {self.resolution} x {self.resolution}, batch {pictures}{per}, on {self.device}"]
        lines += [*([f"prior loss: {self.prior_cost}"] if self.prior_cost else []), ""]
        rows = [(name, size) for name, size in self.components.items() if size >= 5 * 10**5]
        where = "CUDA context" if self.device == "cuda" else "interpreter and libraries"
        rows += [(f"{where} (allowed for)", self.context)] if self.context else []
        lines += [f"  {name:<30}{size / 1e9:8.3f} GB" for name, size in rows]
        lines += [f"  {'together':<30}{self.total / 1e9:8.3f} GB"]
        if self.budget is not None:
            lines += [f"  {'budget':<30}{self.budget / 1e9:8.3f} GB"]
        counts = Counter(self.assignment.values())
        named = ", ".join(f"{counts[p]} {PLAN_NAMES[p]} ({p})" for p in PLANS if counts[p])
        lines += ["", f"recomputation plans of the {len(self.assignment)} layers: {named}"]
        lines += [f"work beyond the fastest plans: {self.slowdown:.0%}"]
        if self.measured:
            took, held = self.measured["seconds"], self.measured["bytes"] / 1e9
            lines += [f"one real step: {took:.3f} s, {held:.3f} GB held"]
        return "\n".join([*lines, self.missing or ("It fits." if self.budget is not None else "")]).rstrip()


def plan(
    model: Any,
    method: str,
    resolution: int | None = None,
    batch: int | None = None,
    budget: str | float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    measure: bool = False,
    beside: int = 0,
    **settings: Any,
) -> Plan:
    """The memory of one training step of `method`, and the fastest memory plans that keep it within `budget`.

    Args:
        model: a Model, a UNet, a folder, a hub name, or a UNet's configuration ({"unet": ..., "text_encoder": ...}).
        method: a name in `pcs_trainer.methods.TITLES`.
        resolution: pixels a side; None is the model's native size.
        batch: pictures of the subject in one forward; None starts at the method's own batch and halves it,
            accumulating gradients instead, until the plan that keeps little (C) fits.
        budget: "6GB", "6000MB" or bytes; None asks for the fastest plans. It includes the CUDA context on "cuda".
        dtype: of the model's weights.
        device: what is planned for: "cuda", or "cpu", where the kernels keep packed copies of frozen weights.
        measure: on a GPU, run the candidates under a hard cap and take the fastest.
        beside: bytes of the budget that are not the step's, where it is planned for the CPU.
        settings: the method's other settings; those that change the memory are rank, variant, train_token and the like.

    Returns:
        the plan; `plan.fits` says whether it is within the budget, `plan.missing` what is missing.
    """
    s, networks = asked_for(model, method, settings)
    allowed = None if budget is None else bytes_of(budget, "budget")
    resolution = resolution or s.resolution or networks.resolution
    check_asked(resolution, batch, dtype, device, networks.pixels, measure)
    context = CUDA_CONTEXT if device == "cuda" else beside
    limit = None if allowed is None else allowed - context
    prior = 1 if s.prior_weight else 0
    wanted = (s.batch if batch is None else batch) * s.accumulate

    def counted(pictures: int) -> Counted:
        size = pictures * (1 + prior), resolution // networks.pixels
        return counted_once(Request(networks, s, size, dtype, device, wanted > pictures))

    pictures = batch or s.batch
    if batch is None and limit is not None:
        pictures = _halved_until_it_fits(counted, pictures, limit)
    chosen = counted(pictures)
    assignment = _choose(chosen, limit)
    missing = ""
    if limit is not None and chosen.bytes(assignment) > limit:
        smaller = counted(1) if pictures > 1 else None
        missing = _missing(chosen, assignment, limit + context, context, smaller)
    count = chosen.count(assignment)
    found = Plan(
        method=method,
        resolution=resolution,
        batch=pictures,
        prior=prior * pictures,
        accumulate=-(-wanted // pictures),
        device=device,
        budget=allowed,
        components=chosen.components(assignment),
        context=context,
        kept=count.kept,
        gradients=max(count.gradients, chosen.lasting().get("gradients", 0)),
        assignment=assignment,
        slowdown=count.work / min(chosen.count(p).work for p in PLANS) - 1,
        prior_cost=cost_of_prior(s, bool(chosen.lasting().get(FROZEN_COPY))),
        missing=missing,
    )
    return _measured(found, chosen, limit) if measure and found.fits else found


def cost_of_prior(s: Settings, copies: bool) -> str:
    """What the prior loss costs beside the forward that its half of the batch already is."""
    if not s.prior_weight:
        return ""
    if s.prior == "own":
        copy = ", and a frozen copy of the UNet" if copies else ""
        forwards = s.steps * s.batch * s.accumulate
        return f"no class images; one forward more in each step without gradients ({forwards} images in all){copy}"
    if s.prior_folder:
        return f"the class images in {s.prior_folder}"
    forwards = 2 * s.prior_images * s.prior_steps  # with and without the prompt
    return f"{s.prior_images} class images, sampled before step 1 by {forwards} forwards of one image"


def _halved_until_it_fits(counted: Callable[[int], Counted], pictures: int, limit: int) -> int:
    """The largest of batch, batch / 2, ... 1 with which plan C is within the limit; 1 where none is."""
    while pictures > 1 and counted(pictures).bytes("C") > limit:
        hopeless = sum(counted(pictures).lasting().values()) > limit  # what is there all the time does not shrink
        pictures = 1 if hopeless else pictures // 2
    return pictures


def counted_for(model: Any, found: Plan, dtype: torch.dtype, **settings: Any) -> tuple[Counted, int]:
    """The count that a plan was chosen from, and the pixels a side of its pictures; the arguments are the plan's."""
    s, networks = asked_for(model, found.method, settings)
    size = found.batch + found.prior, found.resolution // networks.pixels
    return counted_once(Request(networks, s, size, dtype, found.device, found.accumulate > 1)), found.resolution


def opened(model: Any) -> Any:
    """What is planned for; the embedded model, of which settings depend, in place of its name."""
    return load_model(model) if isinstance(model, str) and model == "tiny" else model


def asked_for(model: Any, method: str, settings: Mapping[str, Any]) -> tuple[Settings, Networks]:
    """A run's settings, those that are None left to the method, and its networks' configurations."""
    model = opened(model)
    given = {name: value for name, value in settings.items() if value is not None}
    return settings_for(model if isinstance(model, Model) else None, method, **given), networks_of(model)


def bytes_of(amount: str | float, what: str) -> int:
    """An amount of memory in bytes; `what` it is, for the sentence where it is none."""
    try:
        return parse_bytes(amount)
    except ValueError as error:
        raise ValueError(f"the {what} {error}") from None


def check_asked(resolution: Any, batch: Any, dtype: torch.dtype, device: str, pixels: int, measure: bool) -> None:
    """ValueError with one sentence about what cannot be planned."""
    if not isinstance(resolution, int) or resolution < 1 or resolution % pixels:
        raise ValueError(f"the resolution must be a multiple of {pixels} pixels for this model, not {resolution!r}")
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch must be an integer of at least 1, not {batch!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.bfloat16, torch.float16 or torch.float32, not {dtype!r}")
    if device not in ("cuda", "cpu"):
        raise ValueError(f'device must be "cuda" or "cpu", not {device!r}')
    if measure and (device != "cuda" or not torch.cuda.is_available()):
        raise ValueError("measure=True runs real steps and needs a CUDA device; leave it out to count instead")


def _choose(chosen: Counted, limit: int | None) -> dict[str, str]:
    """The fastest assignment whose counted bytes are within the limit, or the smallest one."""
    table = chosen.table()
    if limit is None:
        return fastest(table)
    aim = limit
    for _ in range(6):  # the table adds layers up, the count knows better: the aim is lowered by what it was over
        assignment = fastest_within(table, aim)
        if assignment is None:
            break
        over = chosen.bytes(assignment) - limit
        if over <= 0:
            return assignment
        aim -= over + limit // 500
    candidates = [smallest(table), *(dict.fromkeys(table.names, plan) for plan in PLANS)]
    return min(candidates, key=chosen.bytes)


def _missing(chosen: Counted, assignment: dict[str, str], allowed: int, context: int, smaller: Counted | None) -> str:
    """One sentence: how much is missing, what takes the most, and what would help."""
    components = chosen.components(assignment)
    needed = sum(components.values()) + context
    largest = max(components, key=lambda name: components[name])
    sentence = (
        f"{(needed - allowed) / 1e9:.2f} GB are missing: the smallest step found needs {needed / 1e9:.2f} GB of the "
        f"{allowed / 1e9:.2f} GB allowed, and {components[largest] / 1e9:.2f} GB of it are {largest}"
    )
    if smaller is not None and smaller.bytes("C") + context <= allowed:
        sentence += "; batch=1 with more accumulation fits"
    return sentence + "."


def _measured(found: Plan, chosen: Counted, limit: int | None) -> Plan:
    """Real steps of each candidate under a hard cap on the allocator; the fastest that ran through."""
    table = chosen.table()
    candidates = [found.assignment, *(dict.fromkeys(table.names, plan) for plan in PLANS)]
    runs = [(run, c) for c in candidates if (run := _real_step(chosen, c, limit)) is not None]
    if not runs:
        found.missing = (
            "No candidate ran through under the cap, though the count says that one should; raise the budget."
        )
        return found
    found.measured, found.assignment = min(runs, key=lambda pair: pair[0]["seconds"])
    found.components = chosen.components(found.assignment)
    return found


def _real_step(chosen: Counted, assignment: dict[str, str], limit: int | None) -> dict[str, float] | None:
    """Seconds and peak bytes of one step on the GPU, or None where it ran out of memory."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, total if limit is None else limit / total))
    real: Rehearsal | None = None
    try:
        real = chosen.request.rehearsal("cuda", counted=False)
        real.unet.set_plan(assignment)
        for _ in range(2):
            real.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        real.step()
        torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, "bytes": float(torch.cuda.max_memory_allocated())}
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        real = None  # before the cache is emptied: the networks go with it
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
