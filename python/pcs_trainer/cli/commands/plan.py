"""pcs plan: what a training step needs in memory, and the fastest plan within a budget."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ...errors import DoesNotFit, UsageError
from ..exit_codes import DOES_NOT_FIT, DONE
from ..options import Command, Option, byte_size, grouped, integer, one_of
from . import COMMANDS
from .common import DTYPES, HUB_EXAMPLE, METHOD, MODEL, RESOLUTION, say
from .other_trainers import MODEL_TRANSLATE

if TYPE_CHECKING:
    from ...memory.planner import Plan
    from ...model.model import Model

OPTIONS = grouped(
    "what to plan",
    METHOD,
    MODEL,
    RESOLUTION,
    Option(
        "--batch",
        "images per forward pass",
        integer(1, "1"),
        metavar="N",
        also=("--train_batch_size",),
        otherwise="the method's, halved until it fits",
    ),
    Option(
        "--accumulate",
        "gradient accumulation steps",
        integer(1, "1"),
        metavar="N",
        also=("--gradient_accumulation_steps",),
        otherwise="what the method's batch needs",
    ),
    Option(
        "--rank",
        "rank of low-rank updates, for methods that have one",
        integer(1, "4"),
        metavar="N",
        also=("--network_dim",),
        otherwise="the method's",
    ),
    Option("--budget", "memory limit, e.g. 6GB", byte_size, metavar="SIZE", otherwise="no limit: the fastest plan"),
    Option("--device", "device to plan for: cuda or cpu", one_of("device", ("cuda", "cpu")), "cuda", "DEVICE"),
    Option("--dtype", ", ".join(DTYPES), one_of("dtype", DTYPES), "bfloat16", "TYPE"),
    Option("--count-only", "on a GPU, trace the steps instead of running one of each candidate", None, False),
)

EXAMPLES = (
    (f"pcs plan --method dreambooth --model {HUB_EXAMPLE} --resolution 512 --budget 8GB",
     "does DreamBooth of SD1.5 fit on an 8 GB card, and how?"),
    ("pcs plan --method personalized_residuals", "the embedded model, as fast as it goes"),
    ("pcs plan --method textboost --batch 4 --budget 1GB", "at a batch of one's own"),
)  # fmt: skip


def run(options: argparse.Namespace) -> int:
    import torch

    from ...memory.planner import plan

    if options.model is None:
        say("no --model given: the embedded model is planned for")
    extra = {"rank": options.rank} if options.rank else {}
    found = plan(
        options.model or "tiny", options.method, options.resolution, options.batch, options.budget,
        dtype=getattr(torch, options.dtype), device=options.device, accumulate=options.accumulate,
        measure=options.device == "cuda" and torch.cuda.is_available() and not options.count_only, **extra,
    )  # fmt: skip
    if options.device == "cpu":
        warn_of_the_reference()
    print(found)
    return DONE if found.fits else DOES_NOT_FIT


def warn_of_the_reference() -> None:
    """A CPU without our kernels holds more than what is counted."""
    from ...machine import slow_note

    if slow_note():
        say("counted for the kernels; plain torch, which runs on this CPU, holds more (attention scores above all)")


def chosen_plan(model: Model, method: str, budget: int, chosen: dict[str, Any]) -> dict[str, Any]:
    """Settings that keep a training of `method` within the budget; the plan is said in a line."""
    import torch

    from ...memory.planner import plan

    weight = model.unet.conv_in.weight
    known = {name: chosen[name] for name in ("rank",) if chosen.get(name)}
    found: Plan = plan(
        model, method, chosen.get("resolution"), chosen.get("batch"), budget, dtype=weight.dtype,
        device=weight.device.type, accumulate=chosen.get("accumulate"), **known,
    )  # fmt: skip
    if not found.fits:
        raise DoesNotFit(f"{method} does not fit: {found.missing}")
    if weight.device.type == "cuda":
        total = torch.cuda.get_device_properties(weight.device).total_memory
        if budget > total:
            raise UsageError(f"--budget: this GPU has {total / 1e9:.1f} GB, and {budget / 1e9:.1f} were allowed")
        torch.cuda.set_per_process_memory_fraction((budget - found.context) / total, weight.device)
    if weight.device.type == "cpu":
        warn_of_the_reference()
    say(f"within {budget / 1e9:.2f} GB: {found.total / 1e9:.2f} GB counted, memory plans {found.plans}")
    return {"plan": found.assignment, "batch": found.batch, "accumulate": found.accumulate}


COMMAND = Command(
    name="plan",
    about=COMMANDS["plan"],
    options=OPTIONS,
    examples=EXAMPLES,
    run=run,
    details="The step is counted storage by storage without a GPU and without weights; on a GPU one real step of each "
    "candidate runs under a hard cap. Exit code 3 says that nothing fits, and by how much.",
    translate=MODEL_TRANSLATE,
)
