"""Who reads an export: said by its report, and by the page's table for every method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import concept_cases
import pytest
from pcs_trainer.concept.formats.readers import readers_of
from pcs_trainer.concept.formats.writing import export
from pcs_trainer.methods import TITLES

PAGE = Path(__file__).parents[1] / "docs" / "command-line.md"
MAKERS = {
    "personalized_residuals": concept_cases.residuals,
    "dreambooth": concept_cases.dreambooth,
    "dreambooth_lora": concept_cases.dreambooth_lora,
    "custom_diffusion": concept_cases.custom_diffusion,
    "textboost": concept_cases.textboost,
    "textual_inversion": lambda model: replace(concept_cases.residuals(model), tensors={}),
    "lora_fa": concept_cases.dreambooth_lora,  # the same layers
}


def cell(concept, format) -> str:
    found = readers_of(concept, format, own_rows=bool(concept.words))
    return ", ".join(found.take) + "".join(f"; not {name}" for name, _ in found.refuse)


def test_the_page_names_the_readers_of_every_method(model):
    """Each row: the method, who reads its kohya files, who reads its files for diffusers."""
    assert MAKERS.keys() == TITLES.keys()
    page = PAGE.read_text()
    for method, make in MAKERS.items():
        concept = make(model)
        row = f"| {TITLES[method]} | {cell(concept, 'kohya')} | {cell(concept, 'diffusers')} |"
        assert row in page, f"docs/command-line.md, export: {row}"


@pytest.mark.parametrize("make", [concept_cases.residuals, concept_cases.custom_diffusion])
@pytest.mark.parametrize("format", ["kohya", "diffusers", "pipeline"])
def test_the_report_names_them(model, tmp_path, make, format):
    concept = make(model)
    assert str(readers_of(concept, format, own_rows=True)) in str(export(concept, tmp_path, format, model))


def test_what_invokeai_cannot_identify(model):
    text = concept_cases.textboost(model)
    assert "InvokeAI" in readers_of(text, "kohya").take
    of_xl = replace(text, meta=text.meta | {"family": "sdxl"})
    for concept in (of_xl, concept_cases.residuals(model)):
        assert "not by InvokeAI, which cannot identify" in str(readers_of(concept, "kohya"))


def test_a_pipeline_is_for_comfyui_where_its_token_table_is_the_base_models(model):
    concept = concept_cases.residuals(model)
    assert "ComfyUI" in readers_of(concept, "pipeline").take
    assert "ComfyUI" not in readers_of(concept, "pipeline", own_rows=True).take
    enlarges = replace(concept, meta=concept.meta | {"settings": '{"stage": "super_resolution"}'})
    assert enlarges.small_noise is not None and readers_of(enlarges, "pipeline").take == ("diffusers",)
