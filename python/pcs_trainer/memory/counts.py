"""A method's step at one size, counted under each recomputation plan."""

from __future__ import annotations

import copy
import functools
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..settings import Settings
from ..unet.plans import PLANS
from .assign import Table
from .ledger import StepCount
from .networks import Networks
from .rehearsal import Rehearsal


@dataclass(frozen=True)
class Request:
    """What a count depends on."""

    networks: Networks
    settings: Settings
    size: tuple[int, int]  # (pictures in one forward, side of the latents)
    dtype: torch.dtype
    device: str
    accumulate: bool

    def __hash__(self) -> int:
        return hash(repr(self))  # configurations are dicts, which have no hash of their own

    def resized(self, size: tuple[int, int]) -> Request:
        """The same at another size, without accumulation."""
        return replace(self, size=size, accumulate=False)

    def rehearsal(self, device: str, counted: bool = True) -> Rehearsal:
        """The step on a device: one without contents to be counted on, or a real one."""
        return Rehearsal(self.networks, self.settings, self.size, self.dtype, device, self.accumulate, counted)


class Counted:
    """One method's step at one size: its rehearsal, and its counts under each memory plan, made when asked for."""

    def __init__(self, request: Request) -> None:
        self.request = request
        # The CPU's kernels pack weights: fake tensors follow them there, which the meta device does not.
        self.fake = FakeTensorMode() if request.device == "cpu" else None
        with self.fake or nullcontext():
            self.rehearsal = request.rehearsal("cpu" if self.fake else "meta")
        self._counts: dict[str, StepCount] = {}
        self._compared: dict[str, int] = {}
        self._predictions: dict[tuple[int, int, bool], StepCount] = {}

    def count(self, assignment: str | dict[str, str]) -> StepCount:
        key = assignment if isinstance(assignment, str) else json.dumps(assignment)
        if key not in self._counts:
            with self.fake or nullcontext():
                self.rehearsal.unet.set_plan(assignment)
                self._counts[key] = self.rehearsal.count()
        return self._counts[key]

    def lasting(self) -> dict[str, int]:
        """What is there all the time, by component."""
        found = self.rehearsal.weights(self.request.settings)
        if self.rehearsal.accumulate:
            found["gradients"] = sum(p.nbytes for p in self.rehearsal.trained)
        if self.fake:
            found["packed copies of weights"] = packed_bytes(self.count("eager"), self.request.settings.packing)
            found["kernels for upsampling"] = sum(t.nbytes for t in self.rehearsal.unet.derived())
        return found

    def components(self, assignment: str | dict[str, str]) -> dict[str, int]:
        found = self.lasting()
        for name, size in self.count(assignment).parts.items():
            found[name] = found.get(name, 0) + size
        return found

    def bytes(self, assignment: str | dict[str, str]) -> int:
        return sum(self.components(assignment).values())

    def table(self) -> Table:
        return Table({plan: self.count(plan) for plan in PLANS}, sum(self.lasting().values()))

    def comparison(self, assignment: str | dict[str, str]) -> int:
        """Bytes that comparing this step's gradients with the reference's makes."""
        key = json.dumps(assignment)
        if key not in self._compared:
            with self.fake or nullcontext():
                self.rehearsal.unet.set_plan(assignment)
                self._compared[key] = self.rehearsal.comparison()
        return self._compared[key]

    def prediction(self, images: int, latent: int, frozen: bool = False) -> StepCount:
        """A prediction for so many images, without a backward; `frozen`: by a network whole that does not train yet."""
        key = images, latent, frozen
        if key not in self._predictions:
            made = self.rehearsal.frozen_prediction if frozen else self.rehearsal.prediction
            with self.fake or nullcontext():
                self._predictions[key] = made(images, latent)
        return self._predictions[key]


def packed_bytes(count: StepCount, packing: str) -> int:
    """Bytes of the packed copies that a count's calls make where `packing` allows them."""
    return sum(size for way, size in count.packed.items() if packing in ("both", way))


@functools.lru_cache(maxsize=8)  # a budget is tried with a few batch sizes; a count holds the networks' shapes
def _counted(request: Request) -> Counted:
    return Counted(request)


def counted_once(request: Request) -> Counted:
    """The count of a request; asked again, the same tracing, whatever is packed and wherever things wait."""
    settings = replace(request.settings, packing="both", offload=False, resident="device", states="device")
    found = copy.copy(_counted(replace(request, settings=settings)))
    found.request = request
    return found
