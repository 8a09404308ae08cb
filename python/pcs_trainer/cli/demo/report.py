"""The demo's report: the judge's scores, sheets of images, attention maps and loss curves, and one page of it all."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from ...evaluation.comparisons import accuracy, similarities
from ...files import written_text
from ...methods import method_named
from ...report.page import write_report
from ...report.run_report import machine, read_losses
from ...report.sheets import attention_sheet, contact_sheet, loss_curves, save_picture
from ...units import bytes_text, time_text
from .state import PROMPTS, Column, Demo, with_lag

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
JUDGE_SIZE = 64  # pixels a side of the images that the judge was trained on


def write_demo_report(demo: Demo, seconds: float) -> None:
    """The files of the demo and its report; `seconds` is the time that it took."""
    curves = [
        {"name": column.name} | read_losses(demo.out / column.concept.method)
        for column in demo.columns
        if column.concept and column.name != with_lag(column.concept.method)
    ]
    items = [
        {"label": column.name, "picture": column.pictures[demo.each], "maps": column.maps} for column in demo.columns
    ]
    prompts = [ask.prompt.format("…") for ask in PROMPTS]
    firsts = {column.name: column.pictures[:: demo.each] for column in demo.columns}
    numbers = scores_table(demo)
    save_picture(contact_sheet(demo.photos, firsts, prompts), demo.out / "contact_sheet.png")
    save_picture(attention_sheet(items), demo.out / "attention.png")
    if curves:
        save_picture(loss_curves(curves), demo.out / "loss_curves.png")
    facts = {"numbers": numbers, "timings": demo.timings, "failures": demo.failures}
    written_text(demo.out / "numbers.json", json.dumps(facts, indent=1))
    rows = [{"prompt": p, "cells": [f[i] for f in firsts.values()]} for i, p in enumerate(prompts)]
    methods = counted(len(demo.methods), "method")
    sheet_note = (
        "All columns start from the same initial noise; … stands for the subject's learned word and the class, and for "
        "the base model for the class alone."
    )
    attention_note = (
        "How much each position attends to the words that name the subject, in the prompt "
        f"{prompts[1]!r}, from the first sampling step to the last."
    )
    page = {
        "title": f"{counted(len(demo.methods), 'way').capitalize()} to learn a {demo.class_word}",
        "lead": f"{len(demo.photos)} photos, {methods}, the embedded model. Everything below was made by one run of "
        f"pcs demo in {time_text(seconds)}.",
        "photos": demo.photos,
        "sheet": {"columns": list(firsts), "rows": rows, "note": sheet_note},
        "numbers": numbers,
        "attention": {"items": items, "note": attention_note},
        "curves": curves,
        "proof": demo.proofs,
        "timings": demo.timings,
        "memory": memory_of(demo),
        "settings": demo.settings,
        "environment": machine("cpu"),
        "failures": demo.failures,
    }
    demo.report = write_report(demo.out / "report.html", page)


def counted(count: int, what: str) -> str:
    """three methods, one way."""
    number = NUMBERS[count] if count < len(NUMBERS) else str(count)
    return f"{number} {what}{'' if count == 1 else 's'}"


def scores_table(demo: Demo) -> dict[str, Any]:
    """The judge's scores: how like the photos the images are, and which of the things asked for it finds."""
    from ...evaluation.image_encoders import JudgeEncoder
    from ...tiny.world import CLASSES

    judge, photos = JudgeEncoder(), [small(p) for p in demo.photos]
    kind = (("kind", demo.class_word),) if demo.class_word in CLASSES else ()
    asks = [replace(ask, shows=ask.shows + kind) for ask in PROMPTS for _ in range(demo.each)]
    rows, real = [], 1.0
    for column in demo.columns:
        shown = [small(p) for p in column.pictures]
        alike = similarities(judge, shown, photos)
        real = alike.get("subject_similarity_real") or real
        subject, prompts = alike["subject_similarity"], accuracy(judge, asks, shown)["all"]
        assert subject is not None  # the judge has a subject space
        rows.append(scores_row(demo, column, subject, prompts))
    note = (
        "Subject fidelity: mean cosine similarity of an image and a photo in the judge's subject space, over all "
        f"pairs; the photos among themselves have {real:.2f}. Prompt fidelity: the share of objects, places and styles "
        "asked for that the judge finds. The judge is a small network trained apart from the model."
    )
    columns = ["", "trains", "trainable parameters", "time", "file", "subject fidelity", "prompt fidelity"]
    return {"columns": columns, "rows": rows, "note": note}


def scores_row(demo: Demo, column: Column, subject: float, prompts: float) -> list[Any]:
    """One column's row of the table; what the base model has none of is a dash."""
    scores = [f"{subject:.2f}", f"{prompts:.0%}"]
    if column.concept is None:
        return [column.name, "–", "–", "–", "–", *scores]
    method = column.concept.method
    seconds = [t["seconds"] for t in demo.timings if t["name"] == f"{column.name}: training"]
    file = demo.out / method / "concept.safetensors"
    return [
        column.name,
        method_named(method).trains,
        column.concept.parameters,
        time_text(seconds[0]) if seconds else "–",
        bytes_text(file.stat().st_size),
        *scores,
    ]


def small(picture: Any) -> Any:
    """A picture as the judge takes it: uint8 [64, 64, 3]."""
    import numpy as np
    from PIL import Image

    shown = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    return np.asarray(shown.convert("RGB").resize((JUDGE_SIZE, JUDGE_SIZE), Image.Resampling.BICUBIC))


def memory_of(demo: Demo) -> list[dict[str, Any]]:
    """What a step of each method needs, part by part."""
    import torch

    from ...memory.planner import plan

    found = []
    for column in demo.columns:
        values = next((s["values"] for s in demo.settings if s["name"] == column.name), None)
        if values and column.concept:
            method, batch = column.concept.method, values["batch"]
            needed = plan("tiny", method, batch=batch, dtype=torch.float32, device="cpu", accumulate=1)
            found.append({"name": column.name, "parts": needed.components})
    return found
