"""What training holds in memory: four methods on three models within usual budgets, and kept bytes by plan.

    python benchmarks/memory.py            counts everything and writes benchmarks/results/memory.csv
    python benchmarks/memory.py --docs     writes docs/memory.md from that file

Nothing is measured in seconds and no GPU is needed: the steps are counted on tensors without contents.
"""

from __future__ import annotations

import argparse
import csv
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import timing
from registry import SD15, SD21, SDXL
from pcs_trainer.memory.planner import plan
from pcs_trainer.unet.recompute import PLANS

DOCS = Path(__file__).parents[1] / "docs" / "memory.md"
RESULTS = timing.RESULTS / "memory.csv"
MODELS = {"SD1.5": (SD15, 512), "SD2.1": (SD21, 768), "SDXL": (SDXL, 1024)}
METHODS = ("dreambooth", "custom_diffusion", "personalized_residuals", "textboost")
BUDGETS = (4, 6, 8, 12, 24)
# The goals for SD1.5 at 512 and batch 1, in GB without the CUDA context.
TARGETS = {"dreambooth": 4.1, "custom_diffusion": 2.5, "personalized_residuals": 1.9, "textboost": 2.2}
PARTS = {"weights": ("UNet weights", "text encoder weights", "trained in float32", "cached text"),
         "optimizer": ("optimizer state", "copy of the last good state"), "gradients": ("gradients",),
         "kept": ("kept activations",), "working": ("working memory",)}  # fmt: skip


def row_of(model: str, found, what: str, budget: float | str) -> dict[str, object]:
    parts = {
        name: f"{sum(found.components.get(n, 0) for n in names) / 1e9:.3f}" for name, names in PARTS.items()
    }  # fmt: skip
    pictures = f"{found.batch}+{found.prior}" if found.prior else str(found.batch)
    return {
        "what": what, "model": model, "resolution": found.resolution, "method": found.method, "budget_gb": budget,
        "fits": "yes" if found.fits else "no", "pictures": pictures, "forwards": found.accumulate,
        "peak_gb": f"{found.peak / 1e9:.3f}", "with_context_gb": f"{found.total / 1e9:.3f}",
        **{f"{name}_gb": value for name, value in parts.items()}, "kept_mb": f"{found.kept / 1e6:.0f}",
        "gradients_at_once_mb": f"{found.gradients / 1e6:.0f}", "plans": found.plans,
        "more_work": f"{found.slowdown:.3f}", "missing": found.missing,
    }  # fmt: skip


def rows(task: tuple[str, str]) -> list[dict[str, object]]:
    """All rows of one method on one model."""
    model, method = task
    config, resolution = MODELS[model]
    made = [
        row_of(model, plan(config, method, resolution, budget=f"{gb}GB"), "budget", gb) for gb in BUDGETS
    ]  # fmt: skip
    if model == "SD1.5":
        within = f"{TARGETS[method] + 0.5}GB"
        made.append(row_of(model, plan(config, method, resolution, batch=1, budget=within), "target", TARGETS[method]))
    return made + kept_rows(model, method)


def kept_rows(model: str, method: str) -> list[dict[str, object]]:
    """Bytes kept for the backward at batch 1 under each plan: of a frozen UNet, and of one that trains whole."""
    from pcs_trainer.memory.planner import _Counted
    from pcs_trainer.memory.rehearsal import networks_of
    from pcs_trainer.settings import settings_for
    import torch

    if method not in ("personalized_residuals", "dreambooth"):
        return []
    config, resolution = MODELS[model]
    settings = settings_for(None, method)
    counted = _Counted(networks_of(config), settings, (1, resolution // 8), torch.bfloat16, "cuda", False)
    what = "kept, frozen" if method == "personalized_residuals" else "kept, trained"
    return [
        {"what": what, "model": model, "resolution": resolution, "method": method, "pictures": 1, "plans": name,
         "kept_mb": f"{counted.count(name).kept / 1e6:.0f}"} for name in PLANS
    ]  # fmt: skip


def write(path: Path, text: str) -> None:
    """The file whole, or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def csv_text(table: list[dict[str, object]]) -> str:
    import io

    columns = list(dict.fromkeys(key for row in table for key in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return file.getvalue()


def cell(row: dict[str, str]) -> str:
    if row["fits"] == "no":
        return f"no, {row['missing'].split()[0]} GB short"
    per = f" x {row['forwards']}" if row["forwards"] != "1" else ""
    return f"{row['with_context_gb']} GB, {row['pictures']}{per}: {row['plans']} (+{float(row['more_work']):.0%})"


def docs_text(table: list[dict[str, str]]) -> str:
    """docs/memory.md from the results."""
    kind = lambda what: [row for row in table if row["what"] == what]  # noqa: E731
    lines = [HEAD.strip(), ""]
    for model, (_, resolution) in MODELS.items():
        lines += [f"### {model} at {resolution} x {resolution}", ""]
        lines += ["| method | " + " | ".join(f"{gb} GB" for gb in BUDGETS) + " |", "|---" * (len(BUDGETS) + 1) + "|"]
        for method in METHODS:
            mine = {row["budget_gb"]: row for row in kind("budget") if (row["model"], row["method"]) == (model, method)}
            lines += [f"| {method} | " + " | ".join(cell(mine[str(gb)]) for gb in BUDGETS) + " |"]
        lines += [""]
    lines += [PARTS_HEAD.strip(), "", "| method | goal | peak | weights | optimizer, copy | kept | working | plans |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in kind("target"):
        parts = " | ".join(row[f"{name}_gb"] for name in ("peak", "weights", "optimizer", "kept", "working"))
        lines += [f"| {row['method']} | {row['budget_gb']} | {parts} | {row['plans']} |"]
    lines += [
        "",
        KEPT_HEAD.strip(),
        "",
        "| model | UNet | " + " | ".join(PLANS) + " |",
        "|---" * (len(PLANS) + 2) + "|",
    ]
    for model, (_, resolution) in MODELS.items():
        for what in ("frozen", "trained"):
            kept = {r["plans"]: r["kept_mb"] for r in kind(f"kept, {what}") if r["model"] == model}
            lines += [f"| {model} {resolution} | {what} | " + " | ".join(kept[name] for name in PLANS) + " |"]
    return "\n".join(lines) + "\n"


HEAD = """
# What training holds in memory

Counted, not measured: every tensor of a training step, on tensors without contents, in bfloat16 (what is trained beside
the network in float32). On the CPU these counts agree with torch's allocator to the byte, or within 8 % where kernels
repack small weights; what a GPU's libraries take as workspace and what its allocator loses between blocks is not in
them. GB is 10^9 bytes. Rebuild with `python benchmarks/memory.py && python benchmarks/memory.py --docs`; ask for other
models, sizes and budgets with `pcs plan`.

Each cell: memory with 0.5 GB for the CUDA context, pictures in one forward (subject + prior; x forwards a step), how
many of the UNet's layers follow which memory plan, and the work beyond the fastest plans. Where a method's own batch
does not fit, the planner halves it and accumulates gradients.
"""
PARTS_HEAD = """
## SD1.5 at 512, one picture of the subject in a forward, against the project's goals

GB at the peak, without the CUDA context. Gradients are no column: with the optimizer's step in the backward, and for
the small methods, they are under a percent of the peak. The copy is of what trains: the last state known to be good.
"""
KEPT_HEAD = """
## Kept for the backward, by memory plan

MB for one picture: of a frozen UNet with low-rank residuals on its output projections, and of a UNet that trains whole.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="write docs/memory.md from the results, count nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV file to write")
    parser.add_argument("--model", choices=list(MODELS), help="this model alone")
    options = parser.parse_args()
    if options.docs:
        with options.out.open(newline="") as file:
            write(DOCS, docs_text(list(csv.DictReader(file))))
        print(f"written: {DOCS.name}")
        return
    tasks = [(model, method) for model in reversed(MODELS) for method in reversed(METHODS)]
    tasks = [task for task in tasks if options.model in (None, task[0])]
    facts = {k: v for k, v in timing.circumstances().items() if k in ("date", "torch", "commit")}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(tasks, pool.map(rows, tasks), strict=True))
    table = [facts | row for task in reversed(tasks) for row in found[task]]
    write(options.out, csv_text(table))
    for row in table:
        print(
            *(row.get(k, "") for k in ("model", "method", "what", "budget_gb", "fits", "peak_gb", "kept_mb", "plans"))
        )


if __name__ == "__main__":
    main()
