"""Memory of a run: four methods on three models within usual budgets, and what each memory plan keeps in a step.

    python benchmarks/memory.py            counts everything and writes benchmarks/results/memory.csv
    python benchmarks/memory.py --least    counts the least of each method at batch 1 anew, and keeps the other rows
    python benchmarks/memory.py --docs     writes docs/memory.md from that file

Nothing is timed and no GPU is needed: a step is traced on meta tensors. Takes about an hour on two cores, --least
a quarter of one.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import timing
import torch
from registry import SD15, SD21, SDXL, measured
from pcs_trainer.files import written_text
from pcs_trainer.memory.planner import Plan, plan
from pcs_trainer.memory.networks import networks_of
from pcs_trainer.memory.rehearsal import Rehearsal
from pcs_trainer.memory.whole_run import RunPlan, plan_run
from pcs_trainer.methods import TITLES, method_named, settings_for
from pcs_trainer.unet.plans import PLANS

DOCS = Path(__file__).parents[1] / "docs" / "memory.md"
RESULTS = timing.RESULTS / "memory.csv"
MODELS = {"SD1.5": (SD15, 512), "SD2.1": (SD21, 768), "SDXL": (SDXL, 1024)}
NOT_MEASURED = {
    "dreambooth_lora": "no memory goal is set for it; `pcs plan` counts it",
    "textual_inversion": "no memory goal is set for it; `pcs plan` counts it",
}
METHODS = measured(("dreambooth", "custom_diffusion", "personalized_residuals", "textboost"), NOT_MEASURED)
BUDGETS = (4, 6, 8, 12, 16, 24)
# How a frozen UNet's weights may be held, and what the columns of the least are called.
HELD = {
    ("full", "device"): "16 bits",
    ("int8", "device"): "8 bits",
    ("full", "streamed"): "16 bits, streamed",
    ("int8", "streamed"): "8 bits, streamed",
}
LEAST = "0.1GB"  # a budget that nothing fits: the plan is then the smallest there is
# The goals for SD1.5 at 512 and batch 1, in GB without the CUDA context.
TARGETS = {"dreambooth": 4.1, "custom_diffusion": 2.5, "personalized_residuals": 1.9, "textboost": 2.2}
PARTS = {  # column of the results: the planner's components in it
    "weights": ("UNet weights", "text encoder weights", "trained in float32", "cached text"),
    "optimizer": ("optimizer state", "copy of the last good state"),
    "gradients": ("gradients",),
    "kept": ("kept activations",),
    "working": ("working memory",),
}
KEPT = {"personalized_residuals": "kept, frozen", "dreambooth": "kept, trained"}  # whose kept bytes are counted by plan
SHOWN = ("model", "method", "what", "budget_gb", "fits", "run_gb", "peak_gb", "kept_mb", "plans")  # printed of each row
STEP = "training step"  # the phase that mostly takes the most
Row = dict[str, str]


def row_of(model: str, found: Plan, what: str, budget: float | str) -> dict[str, object]:
    """One line of the results from what the planner found."""
    parts = {n: sum(found.components.get(part, 0) for part in named) / 1e9 for n, named in PARTS.items()}
    return {
        "what": what,
        "model": model,
        "resolution": found.resolution,
        "method": found.method,
        "budget_gb": budget,
        "fits": "yes" if found.fits else "no",
        "pictures": f"{found.batch}+{found.prior}" if found.prior else str(found.batch),
        "forwards": found.accumulate,
        "peak_gb": f"{found.peak / 1e9:.3f}",
        "with_context_gb": f"{found.total / 1e9:.3f}",
        **{f"{name}_gb": f"{value:.3f}" for name, value in parts.items()},
        "kept_mb": f"{found.kept / 1e6:.0f}",
        "gradients_at_once_mb": f"{found.gradients / 1e6:.0f}",
        "plans": found.plans,
        "more_work": f"{found.slowdown:.3f}",
        "missing": found.missing,
    }


def rows(task: tuple[str, str]) -> list[dict[str, object]]:
    """All rows of one method on one model."""
    model, method = task
    config, resolution = MODELS[model]
    made = budget_rows(model, method)
    if model == "SD1.5" and method in TARGETS:
        step = plan(config, method, resolution, batch=1, budget=f"{TARGETS[method] + 0.5}GB")
        whole = plan_run(config, method, resolution, batch=1, budget=f"{TARGETS[method] + 0.5}GB")
        made.append(row_of(model, step, "target", TARGETS[method]) | largest(whole))
    return made + least_rows(task) + kept_rows(model, method)


def least_rows(task: tuple[str, str]) -> list[dict[str, object]]:
    """The smallest run at batch 1, networks by turns, for each way to hold the UNet's frozen weights."""
    model, method = task
    config, resolution = MODELS[model]
    made: list[dict[str, object]] = []
    for weights, resident in HELD:
        if method_named(method).trains_whole_unet and (weights, resident) != ("full", "device"):
            continue
        found = plan_run(config, method, resolution, 1, LEAST, weights=weights, resident=resident, offload=True)
        made.append(row_of(model, found.step, "least", "") | largest(found))
    return made


def budget_rows(model: str, method: str) -> list[dict[str, object]]:
    """Whole runs within budgets, the report in them: the step's row, and the phase that takes the most."""
    config, resolution = MODELS[model]
    free = plan_run(config, method, resolution)  # what every budget has that holds it: it is tried first
    made: list[dict[str, object]] = []
    for gb in BUDGETS:
        holds = free.largest.bytes <= gb * 10**9
        found = free if holds else plan_run(config, method, resolution, budget=f"{gb}GB")
        fits = {"fits": "yes" if holds or found.fits else "no", "missing": found.missing}
        made.append(row_of(model, found.step, "budget", gb) | largest(found) | fits)
    return made


def largest(found: RunPlan) -> dict[str, object]:
    """The phase that takes the most."""
    return {
        "run_gb": f"{found.largest.bytes / 1e9:.3f}",
        "largest_phase": found.largest.name,
        "weights": found.weights,
        "resident": found.resident,
        "states": found.states,
        "by_turns": "yes" if found.offload else "no",
    }


def kept_rows(model: str, method: str) -> list[dict[str, object]]:
    """Bytes kept for the backward pass at batch 1 under each plan: of a frozen UNet, and of one that trains whole."""
    if method not in KEPT:
        return []
    config, resolution = MODELS[model]
    step = Rehearsal(networks_of(config), settings_for(None, method), (1, resolution // 8), torch.bfloat16)
    made: list[dict[str, object]] = []
    for name in PLANS:
        step.unet.set_plan(name)
        kept = f"{step.count().kept / 1e6:.0f}"
        made.append(
            {
                "what": KEPT[method],
                "model": model,
                "resolution": resolution,
                "method": method,
                "pictures": 1,
                "plans": name,
                "kept_mb": kept,
            }
        )
    return made


def csv_text(table: list[dict[str, object]]) -> str:
    columns = list(dict.fromkeys(key for row in table for key in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return file.getvalue()


def batch_of(row: Row) -> str:
    """4, 1+1 (one class image with it), 2+2 x 4 (in four forward passes)."""
    return row["pictures"] + (f" x {row['forwards']}" if row["forwards"] != "1" else "")


def cell(row: Row) -> str:
    if row["fits"] == "no":
        return f"no, {row['missing'].split()[0]} GB short"
    held = ["8 bits"] * (row.get("weights") == "int8") + ["streamed"] * (row.get("resident") == "streamed")
    held += ["states streamed"] * (row.get("states") == "streamed")
    held += ["by turns"] * (row.get("by_turns") == "yes")
    how = f", {', '.join(held)}" if held else ""
    return f"{row['run_gb']} GB{where(row)}, {batch_of(row)}{how}: {row['plans']} (+{float(row['more_work']):.0%})"


def budget_lines(table: list[Row], model: str) -> list[str]:
    """A model's table: each method within each budget that all of them were counted for."""
    mine = [row for row in table if (row["what"], row["model"]) == ("budget", model)]
    methods = [method for method in METHODS if any(row["method"] == method for row in mine)]
    cells = {(row["method"], row["budget_gb"]): cell(row) for row in mine}
    budgets = [str(gb) for gb in BUDGETS if all((method, str(gb)) in cells for method in methods)]
    lines = ["| method | " + " | ".join(f"{gb} GB" for gb in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    return lines + [f"| {TITLES[m]} | " + " | ".join(cells[m, gb] for gb in budgets) + " |" for m in methods]


def least_lines(table: list[Row]) -> list[str]:
    """The smallest run of each method and model, by how the UNet's frozen weights are held."""
    lines = ["| model | method | " + " | ".join(HELD.values()) + " |", "|---" * (len(HELD) + 2) + "|"]
    for model, (_, resolution) in MODELS.items():
        for method in METHODS:
            mine = {
                (row["weights"], row["resident"]): row
                for row in table
                if (row["what"], row["model"], row["method"]) == ("least", model, method)
            }
            if mine:
                cells = [mine[way]["run_gb"] + where(mine[way]) if way in mine else "" for way in HELD]
                lines += [f"| {model} {resolution} | {TITLES[method]} | " + " | ".join(cells) + " |"]
    return lines


def where(row: Row) -> str:
    """The phase that takes the most, where that is not the training step."""
    return "" if row["largest_phase"] == STEP else f" ({row['largest_phase']})"


def target_lines(table: list[Row]) -> list[str]:
    """SD1.5's steps at batch 1, part by part, beside their goals."""
    lines = [
        "| method | goal | peak | weights | optimizer state, copy | kept activations | working memory | plans |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        if row["what"] == "target":
            parts = " | ".join(row[f"{name}_gb"] for name in ("peak", "weights", "optimizer", "kept", "working"))
            lines += [f"| {TITLES[row['method']]} | {row['budget_gb']} | {parts} | {row['plans']} |"]
    return lines


def kept_lines(table: list[Row]) -> list[str]:
    """MB kept for the backward pass, by model and plan."""
    lines = ["| model | UNet | " + " | ".join(PLANS) + " |", "|---" * (len(PLANS) + 2) + "|"]
    for model, (_, resolution) in MODELS.items():
        for what in ("frozen", "trained"):
            mine = [row for row in table if (row["what"], row["model"]) == (f"kept, {what}", model)]
            kept = {row["plans"]: row["kept_mb"] for row in mine}
            lines += [f"| {model} {resolution} | {what} | " + " | ".join(kept[name] for name in PLANS) + " |"]
    return lines


def docs_text(table: list[Row]) -> str:
    """docs/memory.md from the results."""
    lines = [HEAD.strip(), ""]
    for model, (_, resolution) in MODELS.items():
        lines += [f"### {model} at {resolution} x {resolution}", "", *budget_lines(table, model), ""]
    lines += [LEAST_PAGE_HEAD.strip(), "", *least_lines(table), ""]
    lines += [PARTS_HEAD.strip(), "", *target_lines(table), ""]
    lines += [KEPT_HEAD.strip(), "", *kept_lines(table)]
    return "\n".join(lines) + "\n"


def least_table(table: list[Row]) -> str:
    """The README's table: the smallest run counted for each method and model, and the batch it is for."""
    models = [f"{model} {resolution}" for model, (_, resolution) in MODELS.items()]
    lines = [LEAST_HEAD.strip(), "", f"| method | {' | '.join(models)} |", "|---" * (1 + len(models)) + "|"]
    for method in (m for m in METHODS if any(row["method"] == m for row in table)):
        cells = []
        for model in MODELS:
            # Where a budget is too small, the row holds the smallest step there is.
            mine = [r for r in table if (r["model"], r["method"]) == (model, method) and r["run_gb"]]
            least = min(mine, key=used)
            cells.append(f"fits in {-(-used(least) // 10) / 100:.2f} GB (batch {batch_of(least)})")
        lines.append(f"| {TITLES[method]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def used(row: Row) -> int:
    """MB of a run with the CUDA context."""
    return round(1000 * float(row["run_gb"]))


HEAD = """
# Memory of a run

Computed by tracing, not measured: the lifetime of every tensor of a training step and of each other phase of a run, on
meta tensors, in bfloat16 (what trains beside the network in float32). On the CPU the counts of a step agree with
torch's allocator to the byte, or within 8 % where kernels repack small weights. Not included: a GPU library's
workspace, and what its allocator loses between blocks. GB is 10^9 bytes. Rebuild with
`python benchmarks/memory.py && python benchmarks/memory.py --docs`; ask for other models, sizes and budgets with
`pcs plan`.

Each cell: the most that a run takes from loading to its report, with 0.5 GB for the CUDA context, and the phase that
takes it where that is not the training step; images in one forward pass (subject + class; x N: N forward passes for
one optimizer step); how many of the UNet's layers follow which memory plan; and the compute added to that of the
fastest plans. Where a method's own batch does not fit, the planner halves it and accumulates gradients. Only the step
has plans to choose from: the other phases take what they take, or are left out (`--no-report`).

Where the networks do not fit as they are, they are held otherwise: frozen weights in 8 bits (`--weights int8`), or
streamed from RAM (`--resident streamed`), the optimizer's states streamed (`--states streamed`), and text encoders,
UNet and autoencoder on the GPU by turns (`--offload`). The tables by budget were counted before that, with all networks
on the GPU in 16 bits: where a cell says no, `pcs plan` finds a way today for most; the least is counted anew.
"""
LEAST_PAGE_HEAD = """
## The least, at batch 1

GB of a whole run with its report, networks by turns, optimizer states of more than 0.1 GB streamed, with 0.5 GB for the
CUDA context, and the phase that takes it where that is not the training step. What is streamed waits in the machine's
memory, of which `pcs plan` says how much.
"""
PARTS_HEAD = """
## SD1.5 at 512, batch 1, against the project's goals

GB at the peak, without the CUDA context. Gradients have no column: with the optimizer's step in the backward pass, and
for the small methods, they are under a percent of the peak. The copy is of the trainable parameters: the last good
state.
"""
KEPT_HEAD = """
## Activations kept for the backward pass, by memory plan

MB for one image: of a frozen UNet with low-rank residuals on its output projections, and of a UNet that trains whole.
"""
LEAST_HEAD = """
The least that a run takes, its report included, and its batch (+ class images; x N passes a step): bfloat16, frozen
weights in 8 bits or streamed from RAM, 0.5 GB for the CUDA context included; computed by tracing, not measured.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="write docs/memory.md from the results, count nothing")
    parser.add_argument("--least", action="store_true", help="count the rows of the least alone, and keep the others")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV file to write")
    parser.add_argument("--model", choices=list(MODELS), help="count this model alone")
    options = parser.parse_args()
    if options.docs:
        with options.out.open(newline="") as file:
            written_text(DOCS, docs_text(list(csv.DictReader(file))))
        print(f"written: {DOCS.name}")
        return
    tasks = [(model, method) for model in reversed(MODELS) for method in reversed(METHODS)]
    tasks = [task for task in tasks if options.model in (None, task[0])]
    facts = {k: v for k, v in timing.circumstances().items() if k in ("date", "torch", "commit")}
    kept: list[Any] = []
    if options.least:
        with options.out.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["what"] != "least"]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(tasks, pool.map(least_rows if options.least else rows, tasks), strict=True))
    table = kept + [facts | row for task in reversed(tasks) for row in found[task]]
    written_text(options.out, csv_text(table))
    for row in table:
        print(*(row.get(name, "") for name in SHOWN))


if __name__ == "__main__":
    main()
