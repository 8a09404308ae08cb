"""pcs plan: the memory of every phase of a run, and the fastest recomputation plan within a budget."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DoesNotFit, UsageError
from ...methods import methods_with, why_unknown
from ...units import bytes_text
from ..exit_codes import DOES_NOT_FIT, DONE
from ..options import Command, Option, byte_size, grouped, integer, one_of
from . import COMMANDS
from .common import DTYPES, HOLDING, HUB_EXAMPLE, METHOD, MODEL, MODEL_CONFIG, RAM, RESOLUTION, STATES, dtype_of, say
from .other_trainers import MODEL_TRANSLATE

if TYPE_CHECKING:
    import torch

    from ...memory.whole_run import RunPlan
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
    Option(
        "--prior",
        "what the prior loss compares with: drawn (class images) or own (the frozen model's prediction)",
        one_of("prior", ("drawn", "own")),
        metavar="KIND",
        otherwise="drawn",
    ),
    Option("--budget", "memory limit, e.g. 6GB", byte_size, metavar="SIZE", otherwise="no limit: the fastest plan"),
    Option(
        "--card",
        "plan for this card, e.g. 3060: its memory without --budget, and a step's time at its full rates",
        metavar="NAME",
        otherwise="none",
    ),
    Option("--alternatives", "a table of what 4 to 24 GB would give, and what each costs", None, False),
    RAM,
    replace(MODEL_CONFIG, group="what to plan"),
    *HOLDING,
    STATES,
    Option("--no-report", "plan a run that writes no report", None, False),
    Option("--device", "device to plan for: cuda or cpu", one_of("device", ("cuda", "cpu")), "cuda", "DEVICE"),
    Option("--dtype", ", ".join(DTYPES), one_of("dtype", DTYPES), metavar="TYPE", otherwise="what suits the device"),
    Option("--count-only", "on a GPU, trace the steps instead of running one of each candidate", None, False),
)

EXAMPLES = (
    (
        f"pcs plan --method dreambooth --model {HUB_EXAMPLE} --resolution 512 --budget 8GB",
        "does DreamBooth of SD 1.5 fit into 8 GB, and how?",
    ),
    ("pcs plan --method personalized_residuals --card 3060", "the embedded model on an RTX 3060"),
    ("pcs plan --method textboost --batch 4 --budget 1GB", "with a given batch size"),
)


def run(options: argparse.Namespace) -> int:
    """Plan and print the plan; the exit code."""
    import torch

    from ...memory.alternatives import alternatives, table
    from ...memory.planner import opened
    from ...memory.whole_run import plan_run

    if options.model is None:
        say("no --model given: planning for the embedded model")
    if options.rank and options.method not in methods_with("rank"):
        raise UsageError(f"--rank: {why_unknown(options.method, 'rank')}")
    dtype, reason = dtype_of(options, options.device)
    if options.card is not None:
        dtype, reason = card_dtype(options, dtype), ""
    asked: dict[str, Any] = {
        "resolution": options.resolution,
        "batch": options.batch,
        "dtype": dtype,
        "device": options.device,
        "accumulate": options.accumulate,
        "ram": options.ram,
        "card": options.card,
        "report": not options.no_report,
        "rank": options.rank,
        "prior": options.prior,
        "weights": options.weights,
        "resident": options.resident,
        "states": options.states,
        "offload": options.offload or None,
    }
    measure = options.device == "cuda" and torch.cuda.is_available() and not options.count_only
    model = opened(model_of(options))
    found = plan_run(model, options.method, budget=options.budget, measure=measure, **asked)
    if reason:
        say(f"planned in {str(dtype).removeprefix('torch.')}: {reason}")
    if options.device == "cpu":
        warn_of_the_reference()
    print(found)
    if options.alternatives:
        print(f"\n{table(alternatives(model, options.method, **asked))}")
    return DONE if found.fits else DOES_NOT_FIT


def card_dtype(options: argparse.Namespace, dtype: torch.dtype) -> torch.dtype:
    """What suits the card that is planned for, unless --dtype says otherwise."""
    from ...memory.cards import card_named

    if options.device != "cuda":
        raise UsageError("--card: a card is planned for with --device cuda")
    try:
        card = card_named(options.card)
    except ValueError as error:
        raise UsageError(f"--card: {error}") from None
    return dtype if options.dtype else card.dtype


def model_of(options: argparse.Namespace) -> Any:
    """What is planned for: --model, or the configurations that --model-config gives without any weights."""
    from ...model.model import load_model

    if options.model_config is None:
        return options.model or "tiny"
    where = Path(options.model_config).expanduser()
    if options.model is not None:
        return load_model(options.model, config=where)
    if where.is_dir():
        return where
    try:
        given = json.loads(where.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--model-config: {where} is not a folder or a JSON file of configurations ({error})"
        ) from None
    if not isinstance(given, dict):
        raise UsageError(f"--model-config: {where} holds a {type(given).__name__}; give a configuration")
    return given


def warn_of_the_reference() -> None:
    """Say that a CPU without our kernels needs more than what is counted."""
    from ...machine import slow_note

    if slow_note("cpu"):
        say("counted for the kernels; plain PyTorch, which runs on this CPU, needs more (attention scores above all)")


def chosen_plan(
    model: Model, method: str, budget: int | None, ram: int | None, report: bool, chosen: dict[str, Any]
) -> dict[str, Any]:
    """Settings that keep every phase of a run within the budget, and a line that says what they are.

    Args:
        method: its name.
        budget: bytes on the device, or None.
        ram: bytes of the machine's memory, or None.
        report: whether the run writes one.
        chosen: the settings that the user chose.

    Raises:
        DoesNotFit: where no plan is small enough, with what is missing.
    """
    import torch

    from ...memory.whole_run import WAYS, plan_run

    device = torch.device(model.device)  # the UNet is not read yet: how it is held is found out here
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--budget: memory is counted for cpu and cuda alone, not for {device.type}")
    apart = ("resolution", "batch", "accumulate")  # arguments of plan() itself
    others = {name: value for name, value in chosen.items() if name not in apart}
    found: RunPlan = plan_run(
        model,
        method,
        chosen.get("resolution"),
        chosen.get("batch"),
        budget,
        dtype=model.dtype or model.unet.conv_in.weight.dtype,
        device=device.type,
        accumulate=chosen.get("accumulate"),
        ram=ram,
        report=report,
        **others,
    )
    if not found.fits:
        raise DoesNotFit(f"{method} does not fit: {found.missing}")
    if budget is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if budget > total:
            raise UsageError(f"--budget: {bytes_text(budget)} is more than this GPU's {bytes_text(total)}")
        torch.cuda.set_per_process_memory_fraction((budget - found.step.context) / total, device)
    if device.type == "cpu":
        warn_of_the_reference()
    limits = [f"{what} {bytes_text(size)}" for what, size in (("budget", budget), ("RAM", ram)) if size is not None]
    most = found.largest
    usual = {"weights": "full", "resident": "device", "states": "device"}
    held = [f"{name} {value}" for name in usual if (value := getattr(found, name)) != usual[name]]
    held += ["offload"] * (found.offload and device.type != "cpu")
    how = "".join(f", {one}" for one in held)
    say(f"{', '.join(limits)}: {bytes_text(most.bytes)} needed ({most.name}){how}, recomputation {found.step.plans}")
    # A limit of RAM decides alone how the networks are held.
    return {name: value for name, value in found.settings.items() if budget is not None or name in WAYS}


COMMAND = Command(
    name="plan",
    about=COMMANDS["plan"],
    options=OPTIONS,
    examples=EXAMPLES,
    run=run,
    details="Every phase of the run is traced, tensor by tensor, without a GPU and without weights; on a GPU one real "
    "step of each candidate runs under a hard memory cap. On a CPU the figures are of the whole process. Exit code 3: "
    "nothing fits; the last line says what is missing.",
    translate=MODEL_TRANSLATE,
)
