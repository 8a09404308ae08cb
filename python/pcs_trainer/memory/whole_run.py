"""plan_run(): every phase of a run within a budget, not its step alone; on the CPU with the packed copies that fit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from ..methods import method_named
from ..model.model import refuse_on_the_cpu
from ..unet.streaming import waiting_weights
from .cards import Card, card_named
from .counts import Counted, Request, counted_once
from .phases import LIBRARIES, Phase, Phases, as_read
from .planner import CUDA_CONTEXT, Plan, asked_for, bytes_of, check_asked, counted_for, opened, plan

Packing = Literal["both", "forward", "none"]  # from the fastest to the smallest
# The settings that say how the networks and the optimizer's states are held.
WAYS = ("resident", "weights", "states", "packing", "offload")
What = tuple[Any, str, int | None, int | None]  # model, method, resolution, batch
LARGE = 100_000_000  # bytes of optimizer state that are worth streaming
TRIES = 4  # plans of a step, each within less, until what surrounds it on the CPU fits too


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run's step, and what each of its phases holds; `str(plan)` is both tables."""

    step: Plan
    phases: list[Phase]
    packing: Packing
    offload: bool
    weights: str
    resident: str
    states: str
    budget: int | None
    ram: int | None
    card: Card | None = None
    seconds: float = 0.0  # of a step at that card's full rates
    missing: str = ""  # empty where the run fits, else what is missing

    @property
    def fits(self) -> bool:
        """Whether every phase is within the budget, and within the machine's memory."""
        return not self.missing

    @property
    def largest(self) -> Phase:
        """The phase that holds the most on the device."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def settings(self) -> dict[str, Any]:
        """The trainer's settings that this plan stands for."""
        return self.step.settings | {name: getattr(self, name) for name in WAYS}

    def __str__(self) -> str:
        cpu = self.step.device == "cpu"
        lines = [str(self.step).removesuffix("It fits.").rstrip(), "", "phases of the run:"]
        if not cpu:
            lines[-1] += "                GPU        RAM"
        for phase in self.phases:
            ram = "" if cpu else f"{phase.ram / 1e9:8.3f} GB"
            most = "  (largest)" if phase is self.largest else ""
            lines += [f"  {phase.name:<18}{phase.bytes / 1e9:8.3f} GB{ram}{most}"]
        if cpu:
            lines += [f"packed copies of frozen weights: {PACKED[self.packing]}"]
        if self.weights == "int8":
            lines += ["the UNet's frozen weights are held in 8 bits (weights int8)"]
        if self.resident == "streamed":
            lines += ["the UNet's frozen weights wait in RAM, copied to the GPU ahead of use (resident streamed)"]
        if self.states == "streamed":
            lines += ["the optimizer's states wait in RAM, each on the GPU for its update (states streamed)"]
        if self.offload and not cpu:
            lines += ["text encoders, UNet and autoencoder take turns on the GPU (offload)"]
        if self.card is not None:
            lines += [
                f"at {self.card.name}'s full rates, call after call, a step takes {self.seconds:.3g} s (modelled)"
            ]
        lines += [f"RAM limit: {self.ram / 1e9:.3f} GB"] if self.ram is not None else []
        given = self.budget is not None or self.ram is not None
        return "\n".join([*lines, self.missing or ("It fits." if given else "")]).rstrip()


PACKED = {"both": "for both directions", "forward": "for the forward alone", "none": "none"}


def plan_run(
    model: Any,
    method: str,
    resolution: int | None = None,
    batch: int | None = None,
    budget: str | float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    measure: bool = False,
    ram: str | float | None = None,
    report: bool = True,
    card: str | None = None,
    **settings: Any,
) -> RunPlan:
    """`plan`, and every other phase of the run: class images, the gradient check, previews, the end, the report.

    Args:
        model, method, resolution, batch, budget, dtype, device, measure, settings: as `plan` takes them; the budget
            is of every phase.
        ram: a limit of the machine's memory; on the CPU the smaller of it and the budget counts.
        report: whether the run ends with a report.
        card: a card's name: without a budget its memory is the budget, and the plan says what a step takes at its
            full rates: a model, which no kernel reaches.

    Returns:
        the first that fits of full weights and 8 bits on the device, and of the two streamed to a GPU, each with the
        optimizer's states there and, where they are large, streamed too; with packed copies for both directions, for
        the forward, and none (CPU), or with all networks on the GPU at once and by turns. Where none fits, the last,
        which says what is missing. What the settings say is not tried otherwise.
    """
    model = opened(model)  # once for all packings
    sheet = None if card is None else card_named(card)
    if sheet is not None and budget is None:
        budget = sheet.memory * 10**9
    allowed = None if budget is None else bytes_of(budget, "budget")
    memory = None if ram is None else bytes_of(ram, "RAM limit")
    cpu = device == "cpu"
    limit = min((x for x in (allowed, memory) if x is not None), default=None) if cpu else allowed
    beside = LIBRARIES if cpu else 0
    frozen = not method_named(method).trains_whole_unet
    held = {"weights": getattr(model, "weights", "full"), "resident": getattr(model, "resident", "device")}
    coded = settings.get("optimizer", "adamw8bit") in (None, "adamw8bit")
    choices: dict[str, tuple[Any, ...]] = {
        "resident": ("device", "streamed") if frozen and not cpu else ("device",),
        "weights": ("full", "int8") if frozen else ("full",),
        "states": ("device", "streamed") if not cpu and coded else ("device",),
        "packing": get_args(Packing) if cpu else ("both",),
        "offload": (False,) if cpu else (False, True),
    }
    given = {name: value for name, value in held.items() if value != choices[name][0]} | settings
    refuse_on_the_cpu(device, resident=given.get("resident"), states=given.get("states"))
    s, networks = asked_for(model, method, given)
    check_asked(resolution or s.resolution or networks.resolution, batch, dtype, device, networks.pixels, measure)
    what = model, method, resolution, batch
    ways = _ways(given, choices, limit is not None)
    if len({way["states"] for way in ways}) > 1 and _has_small_states(what, dtype, device, ways[0]):
        ways = [way for way in ways if way["states"] == "device"]
    for way in ways:
        if limit is not None and way is not ways[-1] and _is_hopeless(what, limit, dtype, device, report, way):
            continue
        found = _planned(what, limit, dtype, device, measure, beside, report, way)
        missing = found.missing or _missing(found.phases, limit, memory, way)
        found = replace(found, budget=allowed, ram=memory, card=sheet, missing=missing)
        if found.fits:
            break
    return found if sheet is None else replace(found, seconds=_seconds(what, dtype, found, sheet, way))


def _ways(settings: dict[str, Any], choices: dict[str, tuple[Any, ...]], limited: bool) -> list[dict[str, Any]]:
    """The settings with each way to hold the networks, from the fastest on; what was asked for stays.

    The full precision is tried before 8 bits: these change what is learned, if only a little. Streaming comes last:
    every weight crosses to the GPU twice a step.
    """
    for name, values in choices.items():
        asked = settings.get(name)
        choices[name] = (asked,) if asked is not None else values if limited else values[:1]
    return [settings | dict(zip(choices, way, strict=True)) for way in itertools.product(*choices.values())]


def _seconds(what: What, dtype: torch.dtype, found: RunPlan, card: Card, way: dict[str, Any]) -> float:
    """A step at a card's full rates; what is streamed comes meanwhile, once in each direction of a forward."""
    counted, _ = counted_for(what[0], found.step, dtype, **way)
    step, trained = counted.count(found.step.assignment), counted.rehearsal.trained
    elements = sum(p.numel() for p in trained)
    update = sum(3 * p.nbytes for p in trained) + 4 * elements  # values and gradients; states of 8 bits, both ways
    computed = found.step.accumulate * card.seconds(step.calls) + card.seconds([(0, update)])
    waiting = as_read(waiting_weights(counted.rehearsal.unet), dtype) if found.resident == "streamed" else 0
    crossed = 2 * waiting * found.step.accumulate + (2 * elements if found.states == "streamed" else 0)
    return max(computed, crossed / (1e9 * card.link))


def _counted(what: What, dtype: torch.dtype, device: str, way: dict[str, Any]) -> tuple[Counted, int]:
    """The count of a step as it was asked for, and the pixels a side of its pictures."""
    model, method, resolution, batch = what
    s, networks = asked_for(model, method, way)
    resolution = resolution or s.resolution or networks.resolution
    size = (batch or s.batch) * (2 if s.prior_weight else 1), resolution // networks.pixels
    return counted_once(Request(networks, s, size, dtype, device, False)), resolution


def _has_small_states(what: What, dtype: torch.dtype, device: str, way: dict[str, Any]) -> bool:
    """Whether the optimizer's states are too small to be streamed."""
    counted, _ = _counted(what, dtype, device, way)
    return counted.lasting()["optimizer state"] < LARGE


def _is_hopeless(what: What, limit: int, dtype: torch.dtype, device: str, report: bool, way: dict[str, Any]) -> bool:
    """Whether what no plan of the step changes is beyond the limit already, where the networks are held this way."""
    if device == "cpu":
        return False
    counted, size = _counted(what, dtype, device, way)
    fixed = Phases(counted, "checkpoint", size, CUDA_CONTEXT, report).without_the_step()
    lasting = sum(size for name, size in counted.lasting().items() if name != "cached text")  # that shrinks with batch
    return CUDA_CONTEXT + lasting > limit or max(p.bytes for p in fixed) > limit


def _planned(
    what: What,
    limit: int | None,
    dtype: torch.dtype,
    device: str,
    measure: bool,
    beside: int,
    report: bool,
    settings: dict[str, Any],
) -> RunPlan:
    """The plan of a run whose networks are held one way."""
    within = limit
    for _ in range(TRIES):
        step = plan(*what, within, dtype, device, measure, beside, **settings)
        counted, size = counted_for(what[0], step, dtype, **settings)
        phases = Phases(counted, step.assignment, size, step.context, report).all()
        over = 0 if limit is None else next(p.bytes for p in phases if p.name == "training step") - limit
        if within is None or over <= 0 or not step.fits:
            break
        within -= over  # what lies between the step's blocks is known once its plan is
    step = replace(step, budget=limit, missing=step.missing if within == limit else "")
    held = {name: settings[name] for name in WAYS}
    return RunPlan(step, phases, **held, budget=None, ram=None, missing=step.missing)


def _missing(phases: list[Phase], limit: int | None, ram: int | None, way: dict[str, Any]) -> str:
    """One sentence: which phase needs how much of what, and what would help; "" where all fit."""
    figures = [("", limit, [(p.bytes, p) for p in phases]), (" RAM", ram, [(p.ram, p) for p in phases])]
    for what, most, needs in figures:
        needed, phase = max(needs, key=lambda pair: pair[0])
        if most is not None and needed > most:
            largest = max(phase.parts, key=lambda name: phase.parts[name])
            part = "" if what else f", and {phase.parts[largest] / 1e9:.2f} GB of it are {largest}"  # of the device's
            waits = [f"--{name} device" for name in ("resident", "states") if way[name] == "streamed"]
            waits += ["a run without --offload"] * bool(way["offload"])
            less = f"; {' or '.join(waits)} takes less of it" if what and waits else ""
            help = HELPS.get(phase.name, less)
            return (
                f"{(needed - most) / 1e9:.2f} GB{what} are missing: the phase '{phase.name}' needs {needed / 1e9:.2f} "
                f"GB of the {most / 1e9:.2f} GB allowed{part}{help}."
            )
    return ""


HELPS = {  # what leaves a phase out
    "report": "; --no-report leaves it out",
    "preview": "; without --preview it is left out",
    "class images": "; --prior-folder gives real ones instead",
    "gradient check": "; --set check_backend=false leaves it out",
    "validation": "; --probe-every 0 leaves it out",
}
