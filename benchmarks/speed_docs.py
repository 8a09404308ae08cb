"""docs/speed.md from results/: targets with what was measured, whole steps, every op; made by benchmarks/plot.py"""

from __future__ import annotations

import csv
from pathlib import Path

import registry
import timing

Row = dict[str, str]
LABELS = {"forward": "forward", "both": "forward + backward", "step": "step"}
METHODS = {
    "personalized_residuals": "Personalized Residuals", "custom_diffusion": "Custom Diffusion",
    "textboost": "TextBoost", "dreambooth_lora": "DreamBooth-LoRA", "dreambooth": "DreamBooth",
}  # fmt: skip
KEPT = {"A": 457, "B": 272, "C": 134}  # MB of SD1.5 at 512, computed from the layer shapes
CARDS = {"dreambooth": 4.6, "custom_diffusion": 3.0, "personalized_residuals": 2.4, "textboost": 2.4}  # GB, CUDA's too
# What is behind a target that was missed: where the time goes, what was tried, what is left.
BEHIND = {
    "share": "with AMX the products themselves are the smaller part of a step: half of self-attention's forward is "
    "exponentials, and norms, gates and copies run at the rate of memory. No faster product mends that.",
    "self_attention": "of 35 ms 18 are exponentials and their sums, 11 the scores (two short products for every tile "
    "that is stored) and 5 the values. Tried: key blocks of 64 to 1024, a shorter exponential (taken), sums left in "
    "memory by the tiles (taken). Left: tiles of queries held over several key tiles.",
    "cross_attention + maps": "the peer needs 3-5 ms here; a fifth of that is little more than the two products and "
    "the exponentials alone. Taken: up to four maps are summed where the exponentials are made (1.8 to 0.4 ms).",
    "lowrank_residual": "the bound asks for the speed of a plain product. With AMX loading the operands takes as long "
    "as multiplying them, and a third of the time is writing out; oneDNN overlaps these better. Tried without gain: "
    "block orders, taller blocks, prefetching. Computing the residual apart takes 1.6 times as long as this.",
    "group_norm_silu": "bound by memory: two reads, one write and the write's own read; torch's own pass reaches "
    "97 GB/s on an EPYC. Stores around the cache would win this ratio and lose the next layer's read, so they were "
    "left.",
    "adamw8bit": "106 instructions for 16 elements (56 of them the update, 50 the coding), at 2.4 a cycle on an EPYC; "
    "not profiled on a Xeon. Taken: lengths known when compiled (22 to 8 ms), tables in registers (to 7.6 ms). More "
    "needs fewer instructions, not fewer bytes.",
    "textboost": "the smallest step counted needs 2.66 GB: 1.72 of it are the UNet's weights, 0.25 the text encoder's. "
    "Frozen weights in 8 bits would bring it under; they are not built.",
}  # fmt: skip


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


def spread(row: Row) -> str:
    """A ratio with its quartiles, or that the peer could not run."""
    if not row["ratio"]:
        return "cannot run here"
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
        f" {facts['threads']} threads, torch {facts['torch']}, {facts['date']} (median; the share is of the machine's"
        " own bf16 matrix rate in that run; quartiles in brackets):\n",
        "| | seconds | over plan A | share |",
        "|---|---|---|---|",
    ]
    for row in rows:
        between = f" ({row['quartile_low']}-{row['quartile_high']})" if row.get("quartile_low") else ""
        over = row["ours_is_faster"] + between
        lines.append(f"| {row['variant']} | {row['seconds']} | {over} | {row['share_of_machine']} |")
    return "\n".join(lines) + "\n\n"


def methods_table(found: list[Row]) -> str:
    """Each method's whole step: ours, and the peers over it."""
    methods: dict[str, dict[str, Row]] = {}  # method -> variant -> row
    for row in found:
        methods.setdefault(row["method"], {})[row["variant"]] = row
    if not methods:
        return ""
    facts = next(iter(next(iter(methods.values())).values()))
    peers = [name for name in next(iter(methods.values())) if name != "pcs"]
    lines = [
        f"A whole step (forward, backward, optimizer) at {facts['size']} on {facts['device']}, torch {facts['torch']},"
        f" {facts['date']}: seconds of ours, and diffusers' training scripts' arithmetic over it (quartiles in"
        " brackets):\n",
        f"| method | pictures | pcs | {' | '.join(peers)} |",
        "|---" * (3 + len(peers)) + "|",
    ]
    for method, rows in methods.items():
        ours = rows["pcs"]
        cells = [
            f"{r['ours_is_faster']} ({r['quartile_low']}-{r['quartile_high']})" if r else ""
            for r in (rows.get(name) for name in peers)
        ]
        lines.append(f"| {METHODS[method]} | {ours['batch']} | {ours['seconds']} s | {' | '.join(cells)} |")
    note = (
        "DreamBooth's peers: bitsandbytes' 8-bit AdamW on float32 weights, as the script's --use_8bit_adam; all in"
        " bfloat16, torch's fused AdamW, which loses updates under half a bfloat16 digit (ours are rounded"
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
        if (
            row["dtype"] != wanted
            or shape not in firsts
            or (row["op"] == "frozen_conv2d" and shape != "sd15 512 mid up")
        ):
            continue
        table.setdefault((row["op"], f"{row['shape']}, {row['peer']}"), {})[row["direction"]] = spread(row)
    if not table:
        return "No results yet.\n"
    facts = rows[0]
    lines = [
        f"Ops on {facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}, bfloat16 (the"
        " optimizer float32); the peer's time over ours, quartiles in brackets:\n",
        "| op | shape, against | forward or step | forward + backward |",
        "|---|---|---|---|",
    ]
    for (op, against), found in table.items():
        first = found.get("forward") or found.get("step", "")
        lines.append(f"| {op} | {against} | {first} | {found.get('both', '')} |")
    return "\n".join(lines) + "\n"


def ops_table() -> str:
    lines = ["| op | shape | dtype | pass | ours, ms | against | ratio |", "|---" * 7 + "|"]
    for row in newest(timing.RESULTS / "ops_cpu.csv"):
        cells = (
            row["op"],
            row["shape"],
            row["dtype"],
            LABELS[row["direction"]],
            row["ours_ms"],
            row["peer"],
            spread(row),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def targets() -> list[tuple[str, str, str, bool, str]]:
    """(what, asked, measured, met, what is behind it) of every target that a CPU can decide."""
    found = []
    rows = steps()
    if rows:
        peers = [float(r["seconds"]) for r in rows if r["variant"].startswith("diffusers")]
        ours = {r["variant"]: r for r in rows}["pcs plan A"]
        mine, share = float(ours["seconds"]), float(ours["share_of_machine"])
        best, plain = min(peers) / mine, max(peers) / mine
        step = "SD1.5 512, frozen step"
        found += [
            (f"{step}, against the best of diffusers", ">= 1.5", f"{best:.2f}", best >= 1.5, "share"),
            (f"{step}, against its plain fp32 script", ">= 2.5", f"{plain:.2f}", plain >= 2.5, "share"),
            (f"{step}, share of the machine's bf16 rate", ">= 80 %", f"{share:.0%}", share >= 0.8, "share"),
        ]
    for row in newest(timing.RESULTS / "ops_cpu.csv"):
        if row["target"]:
            what = f"{row['op']}, {row['shape']}, {row['dtype']}, {LABELS[row['direction']]}, against {row['peer']}"
            found.append((what, f">= {row['target']}", spread(row), row["met"] == "yes", row["op"]))
    memory = newest(timing.RESULTS / "memory.csv")
    kept = {r["plans"]: float(r["kept_mb"]) for r in memory if r["what"] == "kept, frozen" and r["model"] == "SD1.5"}
    for plan, asked in KEPT.items():
        if plan in kept:
            met = kept[plan] <= 1.1 * asked
            found.append((f"kept for the backward, plan {plan}", f"{asked} MB", f"{kept[plan]:.0f} MB", met, "kept"))
    for row in memory:
        if row["what"] == "target" and row["method"] in CARDS:
            asked, used = CARDS[row["method"]], float(row["with_context_gb"])
            what = f"memory of a {METHODS[row['method']]} step, SD1.5 512, CUDA's 0.5 GB included (counted)"
            found.append((what, f"<= {asked} GB", f"{used:.2f} GB", used <= asked + 5e-3, row["method"]))
    return found + lag_targets()


def lag_targets() -> list[tuple[str, str, str, bool, str]]:
    rows = [r for r in newest(timing.RESULTS / "lag.csv") if r["variant"] == "LAG"]
    found = []
    for row in rows[-1:]:
        over, maps = float(row["over_merged"]), int(row["map_bytes"]) / 1e6
        shown = f"{over - 1:+.1%} ({float(row['lower_quartile']) - 1:+.1%} to {float(row['upper_quartile']) - 1:+.1%})"
        found.append(("LAG over the same sampling without it", "<= 3 %", shown, over <= 1.03, "lag"))
        found.append(("LAG's maps", "< 2 MB", f"{maps:.2f} MB", maps < 2, "lag"))
    return found


def targets_table() -> str:
    lines = ["| target | asked | measured | met |", "|---|---|---|---|"]
    found = targets()
    lines += [f"| {what} | {asked} | {said} | {'yes' if met else '**no**'} |" for what, asked, said, met, _ in found]
    short = list(dict.fromkeys(key for *_, met, key in found if not met and BEHIND.get(key)))
    lines += ["", *(f"- **{key}**: {BEHIND[key]}" for key in short)]
    return "\n".join(lines) + "\n"


def tables(run: int) -> list[str]:
    """Steps, whole steps and ops of the newest run (0), or of another machine's before it."""
    makers = (("step.csv", step_table), ("step_methods.csv", methods_table), ("ops_cpu.csv", ops_summary))
    return [maker((runs(timing.RESULTS / name)[run : run + 1] or [[]])[0]) for name, maker in makers]


def others() -> str:
    """The same of every other machine that there are results of."""
    found = []
    for run in range(1, 1 + max(len(runs(timing.RESULTS / name)) for name in ("step.csv", "ops_cpu.csv"))):
        found += [table.rstrip() for table in tables(run) if table and not table.startswith("No results")]
    return "\n## Other machines\n\n" + "\n\n".join(found) + "\n" if found else ""


def page() -> str:
    steps_here, methods_here, _ = tables(0)
    return (
        "# Speed\n\nMade by `python benchmarks/plot.py` from the newest runs in `benchmarks/results/`; `make bench`"
        " adds a run of your machine. Every ratio is the peer's time over ours, taken in turn in one process.\n\n"
        f"## Targets\n\n{targets_table()}\n## Steps\n\n{steps_here}{methods_here}"
        f"![Seconds of a step](step.png)\n\n## Every op\n\n{ops_table()}{others()}"
    )
