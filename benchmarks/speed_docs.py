"""docs/speed.md and the README's speed table from results/: targets, training steps, ops; written by plot.py"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import registry
import timing

from pcs_trainer.methods import TITLES

Row = dict[str, str]
LABELS = {"forward": "forward", "both": "forward + backward", "step": "step"}
SHARE = "share of the machine's measured bf16 matmul peak"
KEPT = {"A": 457, "B": 272, "C": 134}  # MB of SD1.5 at 512, computed from the layer shapes
CARDS = {"dreambooth": 4.6, "custom_diffusion": 3.0, "personalized_residuals": 2.4, "textboost": 2.4}  # GB, CUDA's too
# The README's ops: (op, shape, dtype, pass, peer).
HIGHLIGHTS = (
    ("self_attention", registry.SELF_ATTENTION[0].name, "bfloat16", "both", "sdpa"),
    ("frozen_conv2d", registry.CONV[0].name, "bfloat16", "both", "conv2d"),
    ("lowrank_residual", registry.LOWRANK[0].name, "bfloat16", "both", "plain projection"),
    ("adamw8bit", registry.ADAMW[0].name, "float32", "step", "bitsandbytes AdamW8bit"),
    ("adamw8bit", registry.ADAMW[0].name, "float32", "step", "torch fused AdamW, 32-bit states"),
)
# What is behind a target that was missed: where the time goes, what was tried, what is left.
BEHIND = {
    SHARE: "with AMX, matmuls are the smaller part of a step: half of self-attention's forward pass is exponentials, "
    "and norms, gates and copies are bound by memory bandwidth. A faster matmul would not help.",
    "self_attention": "of 35 ms, exponentials and their sums take 18, scores 11 (two short matmuls for every tile "
    "stored) and values 5. Tried: key blocks of 64 to 1024, a shorter exponential (kept), sums written to memory by "
    "the tiles (kept). Not tried: query tiles held over several key tiles.",
    "cross_attention + maps": "the peer needs 3-5 ms here; a fifth of that is little more than the two matmuls and "
    "the exponentials alone. Kept: up to four maps are summed where the exponentials are computed (1.8 to 0.4 ms).",
    "lowrank_residual": "the target is the speed of a plain matmul. With AMX, loading the operands takes as long as "
    "multiplying them, and a third of the time is writing the result; oneDNN overlaps these better. Tried without "
    "gain: block orders, taller blocks, prefetching. Computing the residual separately takes 1.6 times as long as "
    "this.",
    "group_norm_silu": "bound by memory bandwidth: two reads, one write and the read that a write implies; torch's own "
    "pass reaches 97 GB/s on an EPYC. Non-temporal stores would win this ratio and lose the next layer's read, so "
    "they are not used.",
    "adamw8bit": "106 instructions for 16 elements (56 for the update, 50 for the coding), 2.4 per cycle on an EPYC; "
    "not profiled on a Xeon. Kept: lengths known at compile time (22 to 8 ms), tables in registers (to 7.6 ms). More "
    "speed needs fewer instructions, not fewer bytes.",
    "textboost": "the smallest step counted needs 2.66 GB: 1.72 for the UNet's weights, 0.25 for the text encoder's. "
    "Frozen weights in 8 bits would fit; they are not implemented.",
}


class Target(NamedTuple):
    """What a benchmark is held to, and what came out."""

    what: str
    required: str
    measured: str
    met: bool
    behind: str  # a key of BEHIND


def runs(path: Path) -> list[list[Row]]:
    """The last run of each machine in a results file (the rows of one date and commit), the newest first."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = {row.get("device", ""): (row["date"], row["commit"]) for row in rows}
    order = list(dict.fromkeys(row.get("device", "") for row in reversed(rows)))
    return [[r for r in rows if r.get("device", "") == m and (r["date"], r["commit"]) == last[m]] for m in order]


def newest(path: Path) -> list[Row]:
    """The rows of the last run in a results file."""
    return next(iter(runs(path)), [])


def counted(path: Path) -> list[Row]:
    """All rows of a results file that counts and times nothing: rows that were counted anew stand among older ones."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def spread(row: Row) -> str:
    """A ratio with its quartiles, or that the peer cannot run on that machine."""
    if not row["ratio"]:
        return "not available"
    return f"{row['ratio']} ({row['quartile_low']}-{row['quartile_high']})"


def at_512(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["size"] == "512"]


def steps() -> list[Row]:
    return at_512(newest(timing.RESULTS / "step.csv"))


def step_table(rows: list[Row]) -> str:
    rows = at_512(rows)
    if not rows:
        return ""
    facts = rows[0]
    lines = [
        f"One Personalized-Residuals step, forward and backward, batch 1, SD1.5 at 512, on {facts['device']},"
        f" {facts['threads']} threads, torch {facts['torch']}, {facts['date']} (medians, quartiles in brackets; the"
        " peak is torch's own matmul in the same run):\n",
        f"| | seconds | relative to plan A | {SHARE} |",
        "|---|---|---|---|",
    ]
    for row in rows:
        between = f" ({row['quartile_low']}-{row['quartile_high']})" if row.get("quartile_low") else ""
        over = row["ours_is_faster"] + between
        lines.append(f"| {row['variant']} | {row['seconds']} | {over} | {row['share_of_machine']} |")
    return "\n".join(lines) + "\n\n"


def methods_table(found: list[Row]) -> str:
    """Each method's full training step: ours, and the peers relative to it."""
    methods: dict[str, dict[str, Row]] = {}  # method -> variant -> row
    for row in found:
        methods.setdefault(row["method"], {})[row["variant"]] = row
    if not methods:
        return ""
    facts = next(iter(next(iter(methods.values())).values()))
    peers = [name for name in next(iter(methods.values())) if name != "pcs"]
    lines = [
        f"A full training step (forward, backward, optimizer) at {facts['size']} on {facts['device']}, torch"
        f" {facts['torch']}, {facts['date']}: our seconds, and how many times as long the arithmetic of diffusers'"
        " training scripts takes (quartiles in brackets):\n",
        f"| method | images | pcs | {' | '.join(peers)} |",
        "|---" * (3 + len(peers)) + "|",
    ]
    for method, rows in methods.items():
        ours = rows["pcs"]
        cells = [
            f"{r['ours_is_faster']} ({r['quartile_low']}-{r['quartile_high']})" if r else ""
            for r in (rows.get(name) for name in peers)
        ]
        lines.append(f"| {TITLES[method]} | {ours['batch']} | {ours['seconds']} s | {' | '.join(cells)} |")
    note = (
        "DreamBooth's peers: with float32 weights, bitsandbytes' 8-bit AdamW, as the script's --use_8bit_adam; with"
        " bfloat16 weights, torch's fused AdamW, which loses updates below half a bfloat16 digit (ours are rounded"
        " stochastically)."
    )
    return "\n".join([*lines, "", note]) + "\n\n"


def ops_summary(rows: list[Row]) -> str:
    """One line an op: its first shape in bfloat16 (the optimizer in float32) against its first peer."""
    rows = [row for row in rows if row["ratio"]]
    firsts = {s[0].name for s in (registry.SELF_ATTENTION, registry.CONV, registry.ADAMW)}
    table: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        shape = row["shape"].split(",")[0]
        wanted = "float32" if row["op"] == "adamw8bit" else "bfloat16"
        another_conv = row["op"] == "frozen_conv2d" and shape != registry.CONV[0].name
        if row["dtype"] != wanted or shape not in firsts or another_conv:
            continue
        table.setdefault((row["op"], f"{row['shape']}, {row['peer']}"), {})[row["direction"]] = spread(row)
    if not table:
        return "No results yet.\n"
    facts = rows[0]
    lines = [
        f"Ops on {facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}, bfloat16 (the"
        " optimizer float32); speedup: the peer's time over ours, quartiles in brackets:\n",
        "| op | shape, compared with | forward or step | forward + backward |",
        "|---|---|---|---|",
    ]
    for (op, against), found in table.items():
        first = found.get("forward") or found.get("step", "")
        lines.append(f"| {op} | {against} | {first} | {found.get('both', '')} |")
    return "\n".join(lines) + "\n"


def ops_table() -> str:
    lines = ["| op | shape | dtype | pass | ours, ms | compared with | speedup |", "|---" * 7 + "|"]
    for row in newest(timing.RESULTS / "ops_cpu.csv"):
        cells = (
            *(row[name] for name in ("op", "shape", "dtype")),
            LABELS[row["direction"]],
            row["ours_ms"],
            row["peer"],
        )
        lines.append(f"| {' | '.join(cells)} | {spread(row)} |")
    return "\n".join(lines) + "\n"


def targets() -> list[Target]:
    """Every target that a CPU can decide."""
    return step_targets() + op_targets() + memory_targets() + lag_targets()


def step_targets() -> list[Target]:
    rows = steps()
    if not rows:
        return []
    peers = [float(r["seconds"]) for r in rows if r["variant"].startswith("diffusers")]
    ours = {r["variant"]: r for r in rows}["pcs plan A"]
    mine, share = float(ours["seconds"]), float(ours["share_of_machine"])
    best, plain = min(peers) / mine, max(peers) / mine
    step = "SD1.5 512, frozen step"
    return [
        Target(f"{step}, compared with the best of diffusers", ">= 1.5", f"{best:.2f}", best >= 1.5, SHARE),
        Target(f"{step}, compared with its plain fp32 script", ">= 2.5", f"{plain:.2f}", plain >= 2.5, SHARE),
        Target(f"{step}, {SHARE}", ">= 80 %", f"{share:.0%}", share >= 0.8, SHARE),
    ]


def op_targets() -> list[Target]:
    found = []
    for row in newest(timing.RESULTS / "ops_cpu.csv"):
        if row["target"]:
            case = ", ".join((row["op"], row["shape"], row["dtype"], LABELS[row["direction"]]))
            what = f"{case}, compared with {row['peer']}"
            found.append(Target(what, f">= {row['target']}", spread(row), row["met"] == "yes", row["op"]))
    return found


def memory_targets() -> list[Target]:
    found = []
    memory = counted(timing.RESULTS / "memory.csv")
    kept = {r["plans"]: float(r["kept_mb"]) for r in memory if r["what"] == "kept, frozen" and r["model"] == "SD1.5"}
    for plan, goal in KEPT.items():
        if plan in kept:
            met = kept[plan] <= 1.1 * goal  # a goal computed from layer shapes alone leaves a tenth for the rest
            what = f"activations kept for the backward pass, plan {plan}"
            found.append(Target(what, f"{goal} MB", f"{kept[plan]:.0f} MB", met, "kept"))
    for row in memory:
        if row["what"] == "target" and row["method"] in CARDS:
            asked, used = CARDS[row["method"]], float(row["with_context_gb"])
            what = f"memory of a {TITLES[row['method']]} step, SD1.5 512, with 0.5 GB for the CUDA context (counted)"
            met = used <= asked + 5e-3  # as printed, to 10 MB
            found.append(Target(what, f"<= {asked} GB", f"{used:.2f} GB", met, row["method"]))
    return found


def lag_targets() -> list[Target]:
    rows = [r for r in newest(timing.RESULTS / "lag.csv") if r["variant"] == "LAG"]
    found = []
    for row in rows[-1:]:
        over, maps = float(row["over_merged"]), int(row["map_bytes"]) / 1e6
        shown = f"{over - 1:+.1%} ({float(row['lower_quartile']) - 1:+.1%} to {float(row['upper_quartile']) - 1:+.1%})"
        found.append(Target("overhead of LAG in sampling", "<= 3 %", shown, over <= 1.03, "lag"))
        found.append(Target("LAG's maps", "< 2 MB", f"{maps:.2f} MB", maps < 2, "lag"))
    return found


def targets_table() -> str:
    lines = ["| target | required | measured | met |", "|---|---|---|---|"]
    found = targets()
    lines += [f"| {t.what} | {t.required} | {t.measured} | {'yes' if t.met else '**no**'} |" for t in found]
    missed = list(dict.fromkeys(t.behind for t in found if not t.met and t.behind in BEHIND))
    lines += ["", *(f"- **{TITLES.get(key, key)}**: {BEHIND[key]}" for key in missed)]
    return "\n".join(lines) + "\n"


def summary() -> str:
    """The README's table: a few steps and ops of the newest runs, with their conditions."""
    facts = next(iter(newest(timing.RESULTS / "ops_cpu.csv")), None)
    if facts is None:
        return "No results yet.\n"
    rows = step_highlights(facts["device"]) + op_highlights()
    lines = [
        f"On {facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}, in bfloat16 (the"
        " optimizer in float32). Speedup: the peer's time over ours, in turn in one process, median and quartiles;"
        " below 1 the peer is faster.\n",
        "| | pcs | compared with | speedup |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def between(row: Row) -> str:
    return f"{row['ours_is_faster']} ({row['quartile_low']}-{row['quartile_high']})"


def step_highlights(device: str) -> list[tuple[str, str, str, str]]:
    """A step of Personalized Residuals, and a full one of DreamBooth, against the fastest that diffusers has there."""
    found = []
    by_variant = {row["variant"]: row for row in steps() if row["device"] == device}
    frozen = [row for name, row in by_variant.items() if name.startswith("diffusers")]
    if frozen:
        best, ours = min(frozen, key=seconds), by_variant["pcs plan A"]["seconds"]
        what = "Personalized Residuals, forward + backward, SD1.5 at 512, batch 1"
        found.append((what, f"{ours} s", best["variant"], between(best)))
    methods = newest(timing.RESULTS / "step_methods.csv")
    rows = [row for row in methods if (row["method"], row["device"]) == ("dreambooth", device)]
    peers = [row for row in rows if row["variant"] != "pcs"]
    if peers:
        best, ours = min(peers, key=seconds), next(row["seconds"] for row in rows if row["variant"] == "pcs")
        what = f"DreamBooth, full training step, SD1.5 at {best['size']}, {best['batch']} images"
        found.append((what, f"{ours} s", best["variant"], between(best)))
    return found


def seconds(row: Row) -> float:
    return float(row["seconds"])


def op_highlights() -> list[tuple[str, str, str, str]]:
    found = []
    rows = newest(timing.RESULTS / "ops_cpu.csv")
    for op, shape, dtype, direction, peer in HIGHLIGHTS:
        key = (op, shape, dtype, direction, peer)
        mine = [r for r in rows if (r["op"], r["shape"], r["dtype"], r["direction"], r["peer"]) == key and r["ratio"]]
        found += [
            (f"`{op}`, {shape}, {LABELS[direction]}", f"{float(r['ours_ms']):.3g} ms", peer, spread(r)) for r in mine
        ]
    return found


def tables(run: int) -> list[str]:
    """Steps, full training steps and ops of the newest run (0), or of another machine's before it."""
    makers = (("step.csv", step_table), ("step_methods.csv", methods_table), ("ops_cpu.csv", ops_summary))
    return [maker((runs(timing.RESULTS / name)[run : run + 1] or [[]])[0]) for name, maker in makers]


def others() -> str:
    """The same tables for every other machine with results."""
    found = []
    for run in range(1, 1 + max(len(runs(timing.RESULTS / name)) for name in ("step.csv", "ops_cpu.csv"))):
        found += [table.rstrip() for table in tables(run) if table and not table.startswith("No results")]
    return "\n## Other machines\n\n" + "\n\n".join(found) + "\n" if found else ""


def page() -> str:
    steps_here, methods_here, _ = tables(0)
    return (
        "# Speed\n\nGenerated by `python benchmarks/plot.py` from the newest runs in `benchmarks/results/`; `make"
        " bench` adds a run of your machine. Every speedup is the peer's time over ours, measured in turn in one"
        " process: above 1, ours is faster.\n\n"
        f"## Targets\n\n{targets_table()}\n## Steps\n\n{steps_here}{methods_here}"
        f"![Seconds per step](step.png)\n\n## Every op\n\n{ops_table()}{others()}"
    )
