"""A report as one self-contained HTML page: images inside it, no external requests, no framework.

    write_report("out/report.html", {"title": "A mug", "photos": [...], ...})

Every key but the title may be left out, and its section with it:

    title, lead      str
    photos           pictures (a path, a PIL picture or a uint8 array [H, W, 3])
    sheet            {"columns": [name], "rows": [{"prompt": str, "cells": [picture | None]}], "note": str}
    numbers          {"columns": [name], "rows": [[cell]], "note": str}; numbers stand to the right
    curves           [{"name": str, "steps": [int], "loss": [float]}], each with "smoothed", "subject", "prior" if known
    attention        {"items": [{"label": str, "picture": picture, "maps": [array [h, w]], "prompt": str}], "note": str}
    timings          [{"name": str, "seconds": float}]
    memory           [{"name": str, "parts": {component: bytes}}]
    proof            [{"name": str, "checks": [{"what": str, "passed": bool}]}]
    settings         [{"name": str, "values": {name: value}}]
    environment      {name: value}
    failures         [str]: what could not be made
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ..files import written_text
from ..units import bytes_text, time_text
from ..version import own_version
from .figures import curve_svg, data_uri, heat_uri


def _figure(value: Any, alt: str, caption: str = "") -> str:
    shown = f'<img src="{data_uri(value)}" alt="{escape(alt)}">'
    under = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><button class="zoom" type="button">{shown}</button>{under}</figure>'


def _note(part: dict[str, Any]) -> str:
    return f'<p class="note">{escape(part["note"])}</p>' if part.get("note") else ""


def _photos(photos: list[Any]) -> str:
    return f'<div class="photos">{"".join(_figure(p, f"photo {i + 1}") for i, p in enumerate(photos))}</div>'


def _sheet(sheet: dict[str, Any]) -> str:
    columns = sheet["columns"]
    cells = [f'<div class="head" aria-hidden="true">{escape(c)}</div>' for c in columns]
    for row in sheet["rows"]:
        if len(row["cells"]) != len(columns):
            count = f"{len(row['cells'])} pictures for {len(columns)} columns"
            raise ValueError(f"the sheet's row {row['prompt']!r} has {count}")
        cells.append(f'<div class="prompt">{escape(row["prompt"])}</div>')
        for column, value in zip(columns, row["cells"], strict=True):
            missing = f'<figure><div class="missing">failed</div><figcaption>{escape(column)}</figcaption></figure>'
            cells.append(missing if value is None else _figure(value, f"{column}: {row['prompt']}", column))
    return f'{_note(sheet)}<div class="sheet" style="--columns: {len(columns)}">{"".join(cells)}</div>'


def _numbers(table: dict[str, Any]) -> str:
    is_number = [all(_counts(row[i]) for row in table["rows"]) for i in range(len(table["columns"]))]
    mark = [' class="n"' if n else "" for n in is_number]
    head = "".join(f'<th scope="col"{m}>{escape(c)}</th>' for c, m in zip(table["columns"], mark, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{m}>{escape(_plain(v))}</td>" for v, m in zip(row, mark, strict=True)) + "</tr>"
        for row in table["rows"]
    )
    return f'{_note(table)}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _counts(value: Any) -> bool:
    return not isinstance(value, str) or re.match(r"[-–]?\d|–$", value) is not None


def _plain(value: Any) -> str:
    if value is None or value in ("", (), []):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _curves(curves: list[dict[str, Any]]) -> str:
    figures = []
    for curve in curves:
        lines = []
        if curve.get("loss"):
            lines.append({"label": "loss", "x": curve["steps"], "y": curve["loss"], "colour": 0, "raw": True})
        for colour, key in enumerate(("smoothed", "subject", "prior")):
            if curve.get(key):
                lines.append({"label": key, "x": curve["steps"], "y": curve[key], "colour": colour})
        probe = curve.get("probe") or {}
        if probe.get("step"):
            lines.append({"label": "held-out", "x": probe["step"], "y": probe["held_out"], "colour": 3})
        if lines:
            shown = [
                f'<li><i class="b{line["colour"]}"></i>{line["label"]}</li>' for line in lines if not line.get("raw")
            ]
            key = f'<ul class="key">{"".join(shown)}</ul>'
            if probe.get("step"):
                key += (
                    f'<p class="note">Class drift: the prediction for the class moved by {probe["drift"][-1]:.1%}.</p>'
                )
            figures.append(f"<figure><h3>{escape(curve['name'])}</h3>{curve_svg(curve['name'], lines)}{key}</figure>")
    note = (
        "Thin: every step; bold: smoothed. Held-out: validation loss of the photos, on noise that training never uses."
    )
    return f'<p class="note">{note}</p><div class="two">{"".join(figures)}</div>'


def _attention(attention: dict[str, Any]) -> str:
    items = attention["items"]
    steps = max(len(item["maps"]) for item in items)
    if not steps:
        raise ValueError("the attention section has no maps")
    slider = f'<input type="range" min="0" max="{steps - 1}" value="{steps - 1}" step="1" aria-label="sampling step">'
    figures = []
    for item in items:
        layers = [f'<img src="{data_uri(item["picture"])}" alt="{escape(item["label"])}">']
        for i, values in enumerate(item["maps"]):
            on = ' class="on"' if i == len(item["maps"]) - 1 else ""
            layers.append(f'<img{on} src="{heat_uri(values)}" alt="">')
        caption = escape(item["label"]) + (f"<br>{escape(item['prompt'])}" if item.get("prompt") else "")
        figures.append(f'<figure><div class="stack">{"".join(layers)}</div><figcaption>{caption}</figcaption></figure>')
    control = f'<label class="slider">{slider}<output>step {steps} of {steps}</output></label>'
    return f'{_note(attention)}{control}<div class="maps">{"".join(figures)}</div>'


def _timings(timings: list[dict[str, Any]]) -> str:
    longest = max([t["seconds"] for t in timings] + [1e-9])
    rows = [
        f'<div class="name">{escape(t["name"])}</div><div class="value">{time_text(t["seconds"])}</div>'
        f'<div class="bar"><span class="b1" style="width: {100 * t["seconds"] / longest:.1f}%"></span></div>'
        for t in timings
    ]
    return f'<div class="bars">{"".join(rows)}</div>'


def _memory(memory: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for plan in memory for name, held in plan["parts"].items() if held))
    largest = max([sum(plan["parts"].values()) for plan in memory] + [1])
    rows = []
    for plan in memory:
        bars = "".join(
            f'<span class="b{names.index(name) % 8}" style="width: {100 * held / largest:.2f}%"'
            f' title="{escape(name)}: {bytes_text(held)}"></span>'
            for name, held in plan["parts"].items()
            if held
        )
        total = bytes_text(sum(plan["parts"].values()))
        name = f'<div class="name">{escape(plan["name"])}</div><div class="value">{total}</div>'
        rows.append(f'{name}<div class="bar">{bars}</div>')
    key = "".join(f'<li><i class="b{i % 8}"></i>{escape(name)}</li>' for i, name in enumerate(names))
    columns = ["", *names]
    table = _numbers({"columns": columns, "rows": [[p["name"], *[_held(p, n) for n in names]] for p in memory]})
    return f'<div class="bars">{"".join(rows)}</div><ul class="key">{key}</ul>{table}'


def _held(plan: dict[str, Any], name: str) -> str:
    return bytes_text(plan["parts"][name]) if name in plan["parts"] else "–"


def _proof(proof: list[dict[str, Any]]) -> str:
    blocks = []
    for run in proof:
        checks = [
            f'<li><b class="{"yes" if c["passed"] else "no"}" aria-label="{"passed" if c["passed"] else "failed"}">'
            f"{'✓' if c['passed'] else '✗'}</b>{escape(c['what'])}</li>"
            for c in run["checks"]
        ]
        blocks.append(f'<div><h3>{escape(run["name"])}</h3><ul class="proof">{"".join(checks)}</ul></div>')
    return f'<div class="two">{"".join(blocks)}</div>'


def _settings(settings: list[dict[str, Any]]) -> str:
    opened = " open" if len(settings) == 1 else ""
    return "".join(
        f"<details{opened}><summary>{escape(one['name'])}</summary>{_list(one['values'])}</details>" for one in settings
    )


def _list(values: dict[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_plain(v))}</dd>" for k, v in values.items())
    return f"<dl>{rows}</dl>"


def _failures(failures: Iterable[str]) -> str:
    return "".join(f'<p class="no">{escape(f)}</p>' for f in failures)


SECTIONS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("failures", "Failures", _failures),
    ("photos", "Photos", _photos),
    ("sheet", "Samples", _sheet),
    ("numbers", "Numbers", _numbers),
    ("attention", "Attention", _attention),
    ("curves", "Loss", _curves),
    ("proof", "Checks", _proof),
    ("timings", "Time", _timings),
    ("memory", "Memory", _memory),
    ("settings", "Settings", _settings),
    ("environment", "Machine", _list),
]
KEYS = ("title", "lead", *(key for key, _, _ in SECTIONS))


def page(data: dict[str, Any]) -> str:
    """The HTML of a report.

    Args:
        data: the keys that this file's docstring lists; ValueError names an unknown one.
    """
    unknown = [key for key in data if key not in KEYS]
    if unknown or not data.get("title"):
        what = f"has no section {unknown[0]!r}" if unknown else "needs a title"
        raise ValueError(f"a report {what}; its keys are {', '.join(KEYS)}")
    made = [(key, name, draw(data[key])) for key, name, draw in SECTIONS if data.get(key)]
    sections = [f'<section id="{key}"><h2>{escape(name)}</h2>{body}</section>' for key, name, body in made]
    contents = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in made)
    template = Template((Path(__file__).parent / "template.html").read_text(encoding="utf-8"))
    version, today = own_version(), f"{datetime.now():%d %B %Y}"
    return template.substitute(
        title=escape(data["title"]),
        lead=escape(data.get("lead", "")),
        contents=contents,
        sections="\n".join(sections),
        footer=escape(f"Made by pcs {version} on {today}. Self-contained page: no external requests."),
        version=escape(version),
    )


def write_report(path: str | Path, data: dict[str, Any]) -> Path:
    """Write the page of `page(data)` whole or not at all, and return its path."""
    return written_text(Path(path), page(data))
