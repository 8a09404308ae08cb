"""Write the model card, weights/README.md, from results.json and training.json: no number is typed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ...files import written_text
from ..common import WEIGHTS

PAGE = Path(__file__).with_name("card_template.md")


def percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def card(results: dict[str, Any], training: dict[str, Any], size: int) -> str:
    """The page as text; `size` is that of the folder in bytes."""
    columns = ("kind", "colour", "background", "triple", "pattern", "position")
    rows = [
        f"| {name} | " + " | ".join(percent(results[key][c]) for c in columns) + " |"
        for name, key in (
            ("samples", "drawn"),
            ("samples, class x colour x background never seen together", "novel_triples"),
            ("real renderings", "real"),
            ("through the autoencoder", "reconstructed"),
        )
    ]
    memory = results["memorisation"]
    return PAGE.read_text().format(
        size=size / 1e6,
        made=training["made"],
        limits="\n".join(f"- {line}" for line in training["limits"]),
        captions=results["settings"]["captions"],
        steps=results["settings"]["steps"],
        guidance=results["settings"]["guidance"],
        rows="\n".join(rows),
        bare={k: percent(v) for k, v in results["bare_captions"].items()},
        f=results["frechet"],
        m=memory,
        near=percent(memory["share_of_drawn_nearer_than_the_nearest_1_percent_of_real"]),
        psnr=results["reconstruction_psnr"],
        r=results["subject_retrieval"],
        rank=percent(results["subject_retrieval"]["rank_1"]),
        speed=results["speed"],
        diff=results["diffusers_difference"]["largest"],
    )


def write_card(folder: Path = WEIGHTS) -> None:
    """Write the card beside the weights; results.json and training.json lie one folder above."""
    results = json.loads((folder.parent / "results.json").read_text())
    training = json.loads((folder.parent / "training.json").read_text())
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.name != "README.md")
    written_text(folder / "README.md", card(results, training, size))


if __name__ == "__main__":
    write_card()
